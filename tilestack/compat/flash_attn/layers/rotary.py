"""flash_attn.layers.rotary: rotary embedding as differentiable functions and as a layer."""

from __future__ import annotations

from typing import Any

import torch

from tilestack.compat.flash_attn.errors import check
from tilestack.compat.flash_attn.ops.triton.rotary import apply_rotary


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """[..., D]: each pair of columns (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """In plain torch. x: [B, S, H, D]; cos, sin: [S, R / 2] or [B, S, R / 2]."""
    columns = 2 * cos.shape[-1]
    cos, sin = (
        (each.repeat_interleave(2, -1) if interleaved else torch.cat((each, each), -1)).unsqueeze(-2)
        for each in (cos, sin)
    )
    turned = x[..., :columns]
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, x[..., columns:]), -1)


class ApplyRotaryEmb(torch.autograd.Function):
    """apply_rotary_emb; the gradient is rotated back."""

    @staticmethod
    def forward(
        ctx: Any, x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None
    ) -> torch.Tensor:
        _save(ctx, cos, sin, seqlen_offsets, cu_seqlens)
        ctx.interleaved, ctx.max_seqlen = interleaved, max_seqlen
        if inplace:
            ctx.mark_dirty(x)
        return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin, seqlen_offsets, cu_seqlens = _saved(ctx)
        grad = apply_rotary(grad, cos, sin, seqlen_offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, conjugate=True)
        return grad, *[None] * 7


class ApplyRotaryEmbQKV_(torch.autograd.Function):  # noqa: N801  (flash-attn's name)
    """apply_rotary_emb_qkv_; the gradient is copied and rotated back in place."""

    @staticmethod
    def forward(
        ctx: Any, qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None
    ) -> torch.Tensor:
        _save(ctx, cos, sin, seqlen_offsets, cos_k, sin_k)
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        ctx.mark_dirty(qkv)
        _rotate_qk(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q, conjugate=False)
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin, seqlen_offsets, cos_k, sin_k = _saved(ctx)
        grad = grad.clone(memory_format=torch.contiguous_format)
        _rotate_qk(grad, cos, sin, cos_k, sin_k, ctx.interleaved, seqlen_offsets, ctx.num_heads_q, conjugate=True)
        return grad, *[None] * 7


class ApplyRotaryEmbKV_(torch.autograd.Function):  # noqa: N801  (flash-attn's name)
    """apply_rotary_emb_kv_; the gradient is copied and rotated back in place."""

    @staticmethod
    def forward(ctx: Any, kv, cos, sin, interleaved=False, seqlen_offsets=0) -> torch.Tensor:
        _save(ctx, cos, sin, seqlen_offsets)
        ctx.interleaved = interleaved
        ctx.mark_dirty(kv)
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        return kv

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin, seqlen_offsets = _saved(ctx)
        grad = grad.clone(memory_format=torch.contiguous_format)
        options = {"interleaved": ctx.interleaved, "inplace": True, "conjugate": True}
        apply_rotary(grad[:, :, 0], cos, sin, seqlen_offsets, **options)
        return grad, *[None] * 4


def _save(ctx: Any, cos, sin, seqlen_offsets, *more: torch.Tensor | None) -> None:
    """Keep what backward needs; seqlen_offsets is a tensor or a number."""
    is_tensor = isinstance(seqlen_offsets, torch.Tensor)
    ctx.seqlen_offset = 0 if is_tensor else seqlen_offsets
    ctx.save_for_backward(cos, sin, seqlen_offsets if is_tensor else None, *more)


def _saved(ctx: Any) -> tuple:
    cos, sin, offsets, *more = ctx.saved_tensors
    return cos, sin, ctx.seqlen_offset if offsets is None else offsets, *more


def _rotate_qk(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q, conjugate) -> None:
    """Rotate q and k within qkv: in one launch, if they have the same angles and lie one behind the other."""
    options = {"interleaved": interleaved, "inplace": True, "conjugate": conjugate}
    if qkv.dim() == 5:
        check(qkv.shape[2] == 3, "qkv", "[B, S, 3, H, D]", list(qkv.shape))
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        adjacent = qkv.stride(2) == qkv.shape[3] * qkv.stride(3)
        both = qkv[:, :, :2].flatten(2, 3) if adjacent else None
    else:
        check(qkv.dim() == 4 and num_heads_q is not None, "num_heads_q", "given for qkv [B, S, H, D]", num_heads_q)
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        fits = num_heads_k > 0 and num_heads_q + 2 * num_heads_k == qkv.shape[2]
        check(fits, "qkv", f"of num_heads_q + 2 Hk heads, num_heads_q = {num_heads_q}", list(qkv.shape))
        both = qkv[:, :, : num_heads_q + num_heads_k]
        q, k = both[:, :, :num_heads_q], both[:, :, num_heads_q:]
    if both is not None and cos_k is None and sin_k is None:
        apply_rotary(both, cos, sin, seqlen_offsets, **options)
        return
    apply_rotary(q, cos, sin, seqlen_offsets, **options)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary(k, cos_k, sin_k, seqlen_offsets, **options)


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
):
    """Rotate the first R columns of each head. Differentiable in x.

    x: [B, S, H, D], or [total, H, D] with cu_seqlens (int32 [B + 1]) and max_seqlen.
    cos, sin: [positions, R / 2], the dtype of x.
    interleaved: pairs are (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
    inplace: write into x, and return it.
    seqlen_offsets: the position of each sequence's first token: a number, or int32 or int64 [B].
    """
    return ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv,
    cos,
    sin,
    cos_k=None,
    sin_k=None,
    interleaved=False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
):
    """apply_rotary_emb of q and k in place, within qkv [B, S, 3, H, D], or [B, S, num_heads_q + 2 Hk, D].

    cos_k, sin_k: of k, if they are not those of q. Returns qkv.
    """
    return ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)


def apply_rotary_emb_kv_(
    kv,
    cos,
    sin,
    interleaved=False,
    seqlen_offsets: int | torch.Tensor = 0,
):
    """apply_rotary_emb of k in place, within kv [B, S, 2, H, D]. Returns kv."""
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding whose tables grow with the positions that are asked for.

    dim: the columns that rotate. base: the angle of position p and pair j is p * base ** (-2j / dim).
    interleaved: as in apply_rotary_emb.
    scale_base: XPos (Sun et al., "A Length-Extrapolatable Transformer", 2022; 512 there): q is scaled up and k down
        with the position, relative to the middle of the table.
    """

    def __init__(
        self,
        dim: int,
        base=10000.0,
        interleaved=False,
        scale_base=None,
        device=None,
    ):
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _compute_inv_freq(self, device=None) -> torch.Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> None:
        table = self._cos_cached
        if (
            table is not None
            and seqlen <= self._seq_len_cached
            and (table.device, table.dtype) == (device, dtype)
            and not (self.training and table.is_inference())  # autograd refuses to save it
        ):
            return
        self._seq_len_cached = seqlen
        # a model that was converted to bf16 has converted the frequencies too, which is too coarse for large positions
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device, torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate q and k in place.

        qkv: [B, S, 3, H, D], or [B, S, num_heads_q + 2 Hk, D] with num_heads_q; with kv, q alone: [B, S, H, D].
        kv: [B, S, 2, Hk, D].
        seqlen_offset: a number, or an integer tensor [B].
        max_seqlen: the positions that the tables must have; needed where seqlen_offset is a tensor, which is not read.

        Returns qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        check(cos is not None, "max_seqlen", "given where seqlen_offset is a tensor", max_seqlen)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )  # fmt: skip
        q = apply_rotary_emb_func(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        cos_k, sin_k = (cos, sin) if cos_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
