"""Colours and fonts of the page, beside `style.css`."""

from __future__ import annotations

import gradio as gr

SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]


def page_theme() -> gr.themes.Base:
    """Gradio's Soft theme with system fonts and enough contrast to read."""
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONT, font_mono=["monospace"])
    return theme.set(
        body_background_fill="*neutral_100",
        block_background_fill="white",
        block_border_width="1px",
        block_border_color="*neutral_300",
        block_border_color_dark="*neutral_700",
        block_shadow="none",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        color_accent="*primary_700",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        checkbox_background_color_selected="*primary_800",
        checkbox_background_color_selected_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
