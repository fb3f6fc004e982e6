"""The three safety modules of SafeVLM (arXiv 2405.13581, section 3.2), and the losses that train them (section 3.3).

    vision features -> safety projector -> safety features -> SafetyHead (with the question) -> category, level
                                              |                                                    | policy
                                              +-> SafetyEmbeddings <-------------------------------+
                                                     -> the language model's input, beside each image

Two differences from the reference code: the head pools over the question's tokens (there: over the first position,
which never sees the question), and safety features reach the language model, too (there: constant tokens only).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_safevlm import SafeVlmConfig
from .safety_labels import IGNORE_INDEX
from .safety_policy import ACTIONS


class SafetyModules(nn.Module):
    """All the weights that SafeVLM adds to a base model: what stage 1 trains and what an adapter holds."""

    def __init__(self, config: SafeVlmConfig, vision_hidden_size: int):
        super().__init__()
        text_hidden_size = config.get_text_config().hidden_size
        hidden_size = config.safety_hidden_size or text_hidden_size
        projector_class = CAbstractor if config.safety_projector_type == "c_abstractor" else Resampler
        self.projector = projector_class(config, vision_hidden_size, hidden_size)
        self.head = SafetyHead(config, text_hidden_size, hidden_size)
        self.embeddings = SafetyEmbeddings(config, hidden_size, text_hidden_size) if config.tokens_per_image else None


class CAbstractor(nn.Module):
    """
    Safety projector for square patch grids: convolutions, adaptive pooling, convolutions, a 2-layer MLP. The paper
    takes it from Honeybee (arXiv 2312.06742).
    """

    def __init__(self, config: SafeVlmConfig, vision_hidden_size: int, hidden_size: int):
        super().__init__()
        self.grid = round(config.num_safety_features**0.5)
        if self.grid**2 != config.num_safety_features:
            raise ValueError(
                f"`num_safety_features` must be a square (such as 144) for 'c_abstractor', "
                f"got {config.num_safety_features}."
            )
        depth = config.safety_projector_depth
        self.norm = nn.LayerNorm(vision_hidden_size)  # some dimensions of vision features are much larger than others
        self.input = nn.Linear(vision_hidden_size, hidden_size)
        self.before_pooling = nn.Sequential(*[ConvBlock(hidden_size) for _ in range(depth)])
        self.after_pooling = nn.Sequential(*[ConvBlock(hidden_size) for _ in range(depth)])
        self.output = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )

    def forward(self, patches: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            patches (`torch.FloatTensor` of shape `(num_images, num_patches, vision_hidden_size)`)
            mask: Not supported; every image must fill the same square grid.

        Returns:
            `torch.FloatTensor` of shape `(num_images, num_safety_features, hidden_size)`
        """
        side = round(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1] or mask is not None:
            raise ValueError(
                f"The 'c_abstractor' safety projector needs the same square patch grid for every image, got "
                f"{patches.shape[1]} patches{' with padding' if mask is not None else ''}. "
                f"Use `safety_projector_type='resampler'` for this base model."
            )
        x = self.input(self.norm(patches)).transpose(1, 2).unflatten(2, (side, side))  # (images, hidden, side, side)
        x = self.before_pooling(x)
        if side != self.grid:
            x = F.adaptive_avg_pool2d(x, self.grid)  # (images, hidden, grid, grid)
        x = self.after_pooling(x)
        return self.output(x.flatten(2).transpose(1, 2))  # (images, grid * grid, hidden)


class ConvBlock(nn.Module):
    """Residual bottleneck with grouped convolution and squeeze-and-excitation (RegNet-Y's block)."""

    def __init__(self, channels: int, bottleneck: int = 2, group_width: int = 16):
        super().__init__()
        width = max(channels // bottleneck, 1)
        groups = max(width // group_width, 1)
        while width % groups:
            groups -= 1
        self.norm = nn.GroupNorm(1, channels)
        self.reduce = nn.Conv2d(channels, width, kernel_size=1)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=groups)
        self.squeeze = nn.Linear(width, max(width // 4, 1))
        self.excite = nn.Linear(max(width // 4, 1), width)
        self.expand = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.reduce(self.norm(x)))
        h = F.gelu(self.conv(h))
        gate = torch.sigmoid(self.excite(F.gelu(self.squeeze(h.mean(dim=(2, 3))))))  # (images, width)
        return x + self.expand(h * gate[:, :, None, None])


class Resampler(nn.Module):
    """Safety projector for any number of patches per image: learned queries attend to the patches."""

    def __init__(self, config: SafeVlmConfig, vision_hidden_size: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(vision_hidden_size)
        self.input = nn.Linear(vision_hidden_size, hidden_size)
        self.queries = SafetyTokens(config.num_safety_features, hidden_size, config.initializer_range)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(hidden_size, config.num_attention_heads)
            for _ in range(max(config.safety_projector_depth, 1))
        )
        self.output = nn.LayerNorm(hidden_size)

    def forward(self, patches: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            patches (`torch.FloatTensor` of shape `(num_images, max_patches, vision_hidden_size)`)
            mask (`torch.BoolTensor` of shape `(num_images, max_patches)`, *optional*): `False` marks padding.

        Returns:
            `torch.FloatTensor` of shape `(num_images, num_safety_features, hidden_size)`
        """
        memory = self.input(self.norm(patches))
        x = self.queries(len(patches))
        for layer in self.layers:
            x = layer(x, memory, mask)
        return self.output(x)


class SafetyTokens(nn.Module):
    """A set of trainable tokens, drawn from N(0, `initializer_range`) (paper section 3.2: 0.02)."""

    def __init__(self, num_tokens: int, hidden_size: int, initializer_range: float):
        super().__init__()
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(torch.empty(num_tokens, hidden_size))

    def forward(self, batch_size: int) -> torch.Tensor:
        """Returns `(batch_size, num_tokens, hidden_size)`."""
        return self.weight.expand(batch_size, -1, -1)


class SafetyHead(nn.Module):
    """
    Classifies risk category and level of (question, image) pairs.

    The question's token embeddings attend to the first set of safety tokens and the safety features. The attended
    tokens are pooled with learned weights and classified. A learned token stands for a missing question.
    """

    def __init__(self, config: SafeVlmConfig, text_hidden_size: int, hidden_size: int):
        super().__init__()
        std = config.initializer_range
        self.tokens = SafetyTokens(config.num_head_tokens, hidden_size, std) if config.num_head_tokens else None
        self.no_question = SafetyTokens(1, hidden_size, std)
        self.text_norm = nn.LayerNorm(text_hidden_size)
        self.text_input = nn.Linear(text_hidden_size, hidden_size)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(hidden_size, config.num_attention_heads) for _ in range(config.num_head_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.pooling_score = nn.Linear(hidden_size, 1)
        self.level_classifier = nn.Linear(hidden_size, len(config.level_names))
        self.category_classifier = nn.Linear(hidden_size, len(config.category_names))

    def forward(
        self, text_embeds: torch.Tensor, question_mask: torch.Tensor, safety_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            text_embeds (`torch.FloatTensor` of shape `(num_images, sequence_length, text_hidden_size)`):
                Embeddings of the prompt that each image belongs to.
            question_mask (`torch.BoolTensor` of shape `(num_images, sequence_length)`): `True` for the prompt's text:
                no padding, no placeholders, no hints, and no answers, which would leak the label.
            safety_features (`torch.FloatTensor` of shape `(num_images, num_safety_features, hidden_size)`)

        Returns:
            Level logits `(num_images, num_levels)` and category logits `(num_images, num_categories)`.
        """
        num_images = len(safety_features)
        memory = safety_features
        if self.tokens is not None:
            memory = torch.cat([self.tokens(num_images), memory], dim=1)
        x = torch.cat([self.no_question(num_images), self.text_input(self.text_norm(text_embeds))], dim=1)
        mask = torch.cat([~question_mask.any(dim=1, keepdim=True), question_mask], dim=1)  # (images, 1 + length)
        for layer in self.layers:
            x = layer(x, memory)
        return self.classify(self.norm(x), mask)

    def classify(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools the states `(num_images, length, hidden_size)` where `mask` `(num_images, length)` is `True`."""
        scores = self.pooling_score(states).squeeze(-1).float().masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=1).to(states.dtype).unsqueeze(1)  # (images, 1, length)
        pooled = (weights @ states).squeeze(1)  # (images, hidden)
        return self.level_classifier(pooled), self.category_classifier(pooled)


class SafetyEmbeddings(nn.Module):
    """
    What the language model sees beside each image: the second set of safety tokens and a few safety-projected tokens.
    Both are shifted by an embedding of the action and category that the policy decided on ("conditionally process
    safety embeddings based on safety head output", Algorithm 1).
    """

    def __init__(self, config: SafeVlmConfig, hidden_size: int, text_hidden_size: int):
        super().__init__()
        std = config.initializer_range
        self.num_projected_tokens = config.num_projected_tokens
        num_tokens = config.num_prompt_tokens
        self.tokens = SafetyTokens(num_tokens, text_hidden_size, std) if num_tokens else None
        if config.num_projected_tokens:
            self.queries = SafetyTokens(config.num_projected_tokens, hidden_size, std)
            self.pooling = CrossAttentionLayer(hidden_size, config.num_attention_heads)
            self.output = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, text_hidden_size))
        self.action = nn.Embedding(len(ACTIONS), text_hidden_size)
        self.category = nn.Embedding(len(config.category_names), text_hidden_size)

    def forward(self, safety_features: torch.Tensor, action: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """
        Args:
            safety_features (`torch.FloatTensor` of shape `(num_images, num_safety_features, hidden_size)`)
            action, category (`torch.LongTensor` of shape `(num_images,)`): Ids, see `ACTIONS` and `category_names`.

        Returns:
            `torch.FloatTensor` of shape `(num_images, tokens_per_image, text_hidden_size)`
        """
        num_images = len(safety_features)
        parts = []
        if self.tokens is not None:
            parts.append(self.tokens(num_images))
        if self.num_projected_tokens:
            parts.append(self.output(self.pooling(self.queries(num_images), safety_features)))
        condition = self.action(action) + self.category(category)  # (images, text hidden)
        return torch.cat(parts, dim=1) + condition.unsqueeze(1)


class CrossAttentionLayer(nn.Module):
    """Pre-norm cross attention and MLP, both residual."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: int = 2):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"`num_attention_heads` ({num_heads}) must divide the safety modules' width ({hidden_size}); "
                f"set `safety_hidden_size` or `num_attention_heads`."
            )
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, mlp_ratio * hidden_size),
            nn.GELU(),
            nn.Linear(mlp_ratio * hidden_size, hidden_size),
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (batch, queries, hidden) attends to `memory` (batch, keys, hidden), where `mask` (batch, keys) says."""

        def split_heads(states):  # (batch, length, hidden) -> (batch, heads, length, hidden / heads)
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query, key = self.query(self.norm(x)), self.key(memory)
        # Some attention kernels skip scores that are not finite, and the rest would look like a verdict.
        finite = query.isfinite().flatten(1).all(dim=1) & key.isfinite().flatten(1).all(dim=1)  # (batch,)
        attended = F.scaled_dot_product_attention(
            split_heads(query),
            split_heads(key),
            split_heads(self.value(memory)),
            attn_mask=None if mask is None else mask[:, None, None, :],
        )
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return (x + self.mlp(x)).masked_fill(~finite[:, None, None], float("nan"))


def safety_losses(
    level_logits, category_logits, level_labels, category_labels, assessed: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """
    Cross entropy over levels and categories: means over labelled rows, 0 if there are none, `None` without labels.

    Args:
        level_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(batch_size, num_categories)`)
        level_labels, category_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): -100 is ignored.
        assessed (`torch.BoolTensor` of shape `(batch_size,)`): `False` for rows without an image, which are ignored.
    """

    def cross_entropy(logits, labels):
        if labels is None:
            return None
        labels = labels.to(logits.device).masked_fill(~assessed.to(logits.device), IGNORE_INDEX)
        total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (labels != IGNORE_INDEX).sum().clamp(min=1)

    return {
        "safety_level_loss": cross_entropy(level_logits, level_labels),
        "safety_category_loss": cross_entropy(category_logits, category_labels),
    }


def combine_losses(lm_loss, level_loss, category_loss, level_coef: float, category_coef: float) -> torch.Tensor | None:
    """LM loss + coefficients x safety losses. Any of the three may be `None`; so is the sum if all are."""
    weighted = [(lm_loss, 1.0), (level_loss, level_coef), (category_loss, category_coef)]
    parts = [loss * coef for loss, coef in weighted if loss is not None]
    return sum(part.to(parts[0].device) for part in parts[1:]) + parts[0] if parts else None
