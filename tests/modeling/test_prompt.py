"""Pure functions on tokens: editing prompts, numbering placeholders, assigning images to rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safevlm.backbones import rows_of_units
from safevlm.embedding_override import override_embeddings, placeholder_slots
from safevlm.prompt import edit_prompt, hint_column, last_occurrence

PAD, SAFETY = 0, 9
TOKENS = st.integers(1, 9)
ROWS = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=4)


def pad_rows(rows, sides):
    """A batch of rows, each padded left or right as `sides` says."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row, left in zip(rows, sides, strict=True):
        padding = [PAD] * (length - len(row))
        ids.append(padding + row if left else row + padding)
        mask.append([0] * len(padding) + [1] * len(row) if left else [1] * len(row) + [0] * len(padding))
    return torch.tensor(ids), torch.tensor(mask)


def content(tensor, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(tensor, mask, strict=True)]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rows=ROWS, before=st.lists(TOKENS, max_size=2), drop=st.booleans())
def test_an_edited_prompt_holds_every_rows_tokens_in_order(data, rows, before, drop):
    n = len(rows)
    input_ids, mask = pad_rows(rows, data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    hint = st.none() | st.lists(st.integers(10, 20), min_size=1, max_size=4)
    hints = data.draw(st.lists(hint, min_size=n, max_size=n))
    marks = {"types": torch.arange(1, input_ids.numel() + 1).view_as(input_ids)}
    columns = [hint_column(*row, before) for row in zip(input_ids.tolist(), mask.bool().tolist(), strict=True)]
    edited = edit_prompt(input_ids, mask, marks, hints, columns, drop_id=SAFETY if drop else None)

    for i, row in enumerate(content(edited["input_ids"], edited["attention_mask"])):
        kept = [token for token in rows[i] if not (drop and token == SAFETY)]
        at = hint_column(rows[i], [True] * len(rows[i]), before)
        at -= sum(drop and token == SAFETY for token in rows[i][:at])
        assert row == kept[:at] + (hints[i] or []) + kept[at:]
    left_padded = torch.equal(mask, mask.sort(dim=1).values)
    if drop and SAFETY in sum(rows, []) or any(hints) or not left_padded:
        # left-padded, no wider than needed, and the per-token tensors moved with the tokens
        widths = edited["attention_mask"].sum(dim=1)
        assert edited["input_ids"].shape[1] == widths.max()
        assert torch.equal(edited["attention_mask"], edited["attention_mask"].sort(dim=1).values)
        assert edited["input_ids"][edited["attention_mask"] == 0].eq(PAD).all()
        original = content(marks["types"], mask)
        for i, row in enumerate(content(edited["types"], edited["attention_mask"])):
            expected = [t for t, token in zip(original[i], rows[i], strict=True) if not (drop and token == SAFETY)]
            assert [t for t in row if t] == expected
    else:
        assert edited["input_ids"] is input_ids and edited["attention_mask"] is mask


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=20), pattern=st.lists(st.integers(0, 2), max_size=4))
def test_last_occurrence_is_the_last_place_where_the_pattern_starts(ids, pattern):
    places = [i for i in range(len(ids)) if pattern and ids[i : i + len(pattern)] == pattern]
    assert last_occurrence(ids, pattern) == (places[-1] if places else len(ids))


@settings(deadline=None)
@given(rows=ROWS, prompt=st.lists(TOKENS, max_size=2), side=st.booleans(), answer=st.integers(0, 3))
def test_a_hint_goes_before_the_generation_prompt_and_never_into_the_answer(rows, prompt, side, answer):
    ids, mask = pad_rows([row + prompt + [1] * answer for row in rows], [side] * len(rows))
    for i, row in enumerate(rows):
        question = mask[i].bool().clone()
        if answer:
            question[mask[i].nonzero()[-answer:, 0]] = False
        column = hint_column(ids[i].tolist(), question.tolist(), prompt)
        before = int(mask[i, :column].sum())
        assert before <= len(row) + len(prompt) if not prompt else before == last_occurrence(row + prompt, prompt)
    assert hint_column([1, 2], [False, False], [1]) == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=4), min_size=1, max_size=5))
def test_images_belong_to_the_rows_they_were_written_for(images_per_row):
    actual = rows_of_units([sum(row) for row in images_per_row], sum(images_per_row, []))
    assert actual == [row for row, images in enumerate(images_per_row) for _ in images]


@pytest.mark.parametrize(
    ("tokens_per_row", "tokens_per_image", "message"),
    [
        ([16], [], "Row 0 of `input_ids` has 16 image tokens, but its images take 0"),
        ([16, 20], [16, 16], "Row 1 of `input_ids` has 20 image tokens, but its images take 16"),
        ([8, 24], [16, 16], "Row 0"),
        ([16], [16, 16], "2 images were passed, but `input_ids` has image tokens for 1"),
        ([0], [16], "1 images were passed, but `input_ids` has image tokens for 0"),
    ],
)
def test_images_and_image_tokens_that_do_not_add_up_are_refused(tokens_per_row, tokens_per_image, message):
    with pytest.raises(ValueError, match=message):
        rows_of_units(tokens_per_row, tokens_per_image)


class ToyBase(nn.Module):
    """The parts of a base model that the hooks need: an embedding, and a cache of known length."""

    def __init__(self, vocabulary=20, width=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None):
        return self.embedding(input_ids)


class Cache:
    """Reports its length as dynamic caches do (a number) or as static ones do (a tensor)."""

    def __init__(self, length, static=False):
        self.length = torch.tensor(length) if static else length

    def get_seq_length(self):
        return self.length


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=ROWS, copies=st.integers(1, 3), answer=st.integers(0, 3), static=st.booleans())
def test_placeholders_get_their_own_values_under_expansion_and_chunking(data, rows, copies, answer, static):
    prompt, _ = pad_rows(rows, [True] * len(rows))
    base = ToyBase()
    mask = prompt == SAFETY
    values = 100.0 + torch.arange(int(mask.sum()) * 3, dtype=torch.float).view(-1, 3)
    with torch.no_grad():
        expected = base(prompt).clone()
        expected[mask] = values
        expected = expected.repeat_interleave(copies, dim=0)
        tokens = torch.randint(1, SAFETY, (len(expected), answer))  # tokens after the prompt
        expected = torch.cat([expected, base(tokens)], dim=1)
        sequence = torch.cat([prompt.repeat_interleave(copies, dim=0), tokens], dim=1)
        cuts = sorted(data.draw(st.sets(st.integers(1, sequence.shape[1]), max_size=4)) | {sequence.shape[1]})
        with override_embeddings(base, values, prompt, SAFETY):
            parts, start = [], 0
            for end in cuts:
                parts.append(base(sequence[:, start:end], past_key_values=Cache(start, static)))
                start = end
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_slots_number_the_placeholders_row_by_row():
    prompt = torch.tensor([[SAFETY, 1, SAFETY], [2, SAFETY, 1]])
    assert placeholder_slots(prompt, SAFETY).tolist() == [[0, -1, 1], [-1, 2, -1]]


def test_nothing_is_overridden_outside_the_context_or_in_another_model():
    base, other = ToyBase(), ToyBase()
    other.load_state_dict(base.state_dict())
    prompt = torch.tensor([[1, SAFETY]])
    with torch.no_grad():
        plain = base(prompt)
        with override_embeddings(base, torch.ones(1, 3), prompt, SAFETY):
            assert not torch.equal(base(prompt), plain)
            assert torch.equal(other(prompt), plain)
        assert torch.equal(base(prompt), plain)
        with pytest.raises(RuntimeError), override_embeddings(base, torch.ones(1, 3), prompt, SAFETY):
            raise RuntimeError
        assert torch.equal(base(prompt), plain)


def test_a_replaced_embedding_module_is_hooked_again():
    base = ToyBase()
    prompt = torch.tensor([[1, SAFETY]])
    for _ in range(2):
        with torch.no_grad(), override_embeddings(base, torch.ones(1, 3), prompt, SAFETY):
            assert torch.equal(base(prompt)[0, 1], torch.ones(3))
        base.embedding = nn.Embedding(30, 3)
