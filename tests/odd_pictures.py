"""Pillow's odd images (in `SAFEVLM_TEST_DATA`): those that must load, and those that must be refused."""

# File: size after it is turned upright.
MUST_LOAD = {
    "16_bit_noise.tif": (32, 32),
    "16bit.cropped.tif": (64, 64),
    "1_trns.png": (64, 64),
    "anim_frame1.webp": (82, 82),
    "apng/single_frame.png": (128, 64),
    "decompression_bomb_extents.gif": (100, 100),  # its second frame is the bomb, and is not read
    "dispose_bgnd.gif": (100, 100),
    "flower.jpg": (480, 360),
    "hopper.bmp": (128, 128),
    "hopper.gif": (128, 128),
    "hopper.jpg": (128, 128),
    "hopper.png": (128, 128),
    "hopper.ppm": (128, 128),
    "hopper.tif": (128, 128),
    "hopper.webp": (128, 128),
    "hopper_16bit.pgm": (128, 128),
    "hopper_gray.jpg": (128, 128),
    "hopper_idat_after_image_end.png": (128, 128),
    "hopper_orientation_2.webp": (128, 128),
    "hopper_orientation_6.jpg": (128, 128),
    "hopper_orientation_8.jpg": (128, 128),
    "icc_profile.png": (57, 57),
    "l_trns.png": (64, 64),
    "multiple_exif.jpg": (1, 1),
    "p_trns_single.png": (64, 64),
    "pil123p.png": (162, 150),
    "pil_sample_cmyk.jpg": (100, 100),
    "rgb_trns.png": (64, 64),
    "transparent.gif": (200, 150),
    "transparent.png": (200, 150),
    "unicode_extended.png": (100, 60),
}
# File: text of the error.
MUST_BE_REFUSED = {
    "16bit.s.tif": "no agreed range",
    "apng/chunk_no_fctl.png": "truncated or corrupt",
    "broken.png": "not a readable PNG",
    "broken_data_stream.png": "truncated or corrupt",
    "decompression_bomb.gif": "too large",
    "decompression_bomb.ico": "not a readable PNG",
    "la.tga": "not a readable PNG",
    "truncated_image.png": "truncated or corrupt",
    "truncated_jpeg.jpg": "truncated or corrupt",
    "zero_width.gif": "not a readable PNG",
}
