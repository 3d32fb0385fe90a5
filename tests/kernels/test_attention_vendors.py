"""The adapters to other libraries' attention, without the libraries: stand-ins with their signatures answer with the
reference, and the refusals are asked for by hand. On a GPU the grid runs what is installed.
"""

import sys
import types

import pytest
import torch

from tilestack.kernels.attention import (
    reference,
    vendor_flash_attn,
    vendor_flash_attn_4,
    vendor_sdpa_cudnn,
    vendor_sdpa_efficient,
    vendor_sdpa_flash,
    vendor_xformers,
)  # fmt: skip
from tilestack.kernels.attention.op import OP, AttentionParams
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call, TensorSpec, UnsupportedError

H100 = Device("cuda", "sm_90", "an H100")
NO_FEATURES = (None, None, None)  # sinks, ALiBi slopes, the seed of dropout
SDPA = [vendor_sdpa_cudnn, vendor_sdpa_flash, vendor_sdpa_efficient]
PACKAGES = [vendor_flash_attn, vendor_flash_attn_4, vendor_xformers]


def params(causal=False, left=-1, right=-1, scale=0.3, lengths=(-1, -1), deterministic=False, cap=0.0, drop=0.0):
    right = 0 if causal else right
    return AttentionParams(
        scale, right == 0, left, right, *lengths, deterministic is True, cap, drop, bool(deterministic)
    )  # fmt: skip


def call(
    q=(2, 64, 4, 64), k=None, *, dtype=torch.bfloat16, device=H100, documents=None, needs_grad=True, given=(), **more
) -> Call:
    offsets = None if documents is None else TensorSpec.contiguous((documents + 1,), torch.int32)
    specs = {"q": TensorSpec.contiguous(q, dtype), "k": TensorSpec.contiguous(k or q, dtype)}
    specs |= {"v": specs["k"], "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    vector = TensorSpec.contiguous(q[-2:-1], torch.float32)
    specs |= {name: vector if name in given else None for name in ("sinks", "alibi_slopes", "dropout_seed")}
    return Call(device, specs, params(**more), needs_grad)


DENSE_ONLY = "has no packed input"
UNEVEN = {"q": (1, 8, 4, 64), "k": (1, 16, 4, 64), "causal": True}
GROUPED = {"q": (1, 8, 4, 64), "k": (1, 8, 2, 64)}
PACKED = {"q": (64, 4, 64), "documents": 3}


@pytest.mark.parametrize(
    ("module", "asked", "reason"),
    [
        *[(each, {"dtype": torch.float64}, "got float64") for each in (*SDPA, vendor_flash_attn, vendor_xformers)],
        *[(each, {"dtype": torch.float32}, "got float32") for each in (vendor_sdpa_cudnn, vendor_sdpa_efficient)],
        *[(each, {"q": (1, 8, 4, 256)}, "up to 128, got 256") for each in (vendor_sdpa_cudnn, vendor_xformers)],
        (vendor_flash_attn, {"q": (1, 8, 4, 100)}, "multiples of 8 up to 256, got 100"),
        (vendor_sdpa_cudnn, {"q": (1, 1, 4, 64)}, "length 1"),
        (vendor_sdpa_flash, {"q": (1, 8, 4, 64), "k": (1, 0, 4, 64)}, "empty"),
        *[(each, PACKED, DENSE_ONLY) for each in SDPA],
        *[(each, {"left": 3}, "no window") for each in (*SDPA, vendor_xformers)],
        *[(each, UNEVEN, "top left") for each in SDPA],
        *[(each, GROUPED, "grouped") for each in (vendor_sdpa_efficient, vendor_xformers)],
        *[(each, {"deterministic": True}, "deterministic=True") for each in (*SDPA, vendor_xformers)],
        *[(each, {"deterministic": "keys"}, "deterministic='keys'") for each in (*SDPA, vendor_xformers)],
        (vendor_flash_attn_4, PACKED | {"deterministic": True}, "deterministic=True"),
        (vendor_flash_attn_4, PACKED | {"deterministic": "keys"}, "deterministic='keys'"),
        *[(each, {"cap": 5.0}, "has no softcap") for each in (*SDPA, vendor_xformers)],
        *[(each, {"given": ("sinks",)}, "has no sinks") for each in (*SDPA, *PACKAGES)],
        *[(each, {"given": ("alibi_slopes",)}, "has no alibi_slopes") for each in (*SDPA, *PACKAGES)],
        *[(each, {"drop": 0.1}, "has no dropout") for each in (*SDPA, *PACKAGES)],
        (vendor_xformers, {"cap": 5.0, "given": ("sinks",)}, "has no softcap and no sinks"),
        (vendor_flash_attn, {"q": (5, 4, 64), "documents": 0}, "at least one document"),
    ],
)
def test_what_a_library_lacks_is_refused_with_the_reason(module, asked, reason):
    assert reason in module.refuses(call(**asked))


@pytest.mark.parametrize(
    ("module", "asked"),
    [
        *[(each, {"causal": True}) for each in SDPA],
        *[(each, {"deterministic": True, "needs_grad": False}) for each in SDPA],
        *[(each, GROUPED) for each in (vendor_sdpa_cudnn, vendor_sdpa_flash, vendor_flash_attn, vendor_flash_attn_4)],
        *[
            (each, asked)
            for each in (vendor_flash_attn, vendor_flash_attn_4)
            for asked in ({"cap": 5.0}, PACKED, UNEVEN, {"left": 3, "right": 1}, {"deterministic": True})
        ],
        (vendor_flash_attn, PACKED | {"deterministic": True}),
        (vendor_xformers, PACKED),
        (vendor_xformers, UNEVEN),
    ],
)
def test_what_a_library_has_is_taken(module, asked):
    assert module.refuses(call(**asked)) is None


def test_the_order_on_a_gpu_is_ours_on_hopper_then_cudnn_and_packed_input_goes_to_triton():
    blackwell, ampere = Device("cuda", "sm_100", "a B200"), Device("cuda", "sm_80", "an A100")
    assert OP.choose(call(causal=True)).name == "tilestack"
    assert [OP.choose(call(causal=True, device=each)).name for each in (ampere, blackwell)] == ["cudnn", "cudnn"]
    assert OP.choose(call(**PACKED, device=ampere)).name == "tilestack-triton"
    of_groups = [call(q=(1, 8, heads, 256), k=(1, 8, 4, 256), deterministic="keys") for heads in (16, 32)]
    assert [OP.choose(each).name for each in of_groups] == ["tilestack", "tilestack-triton"]
    assert OP.choose(call(q=(1, 8, 8, 256), deterministic=True)).name == "tilestack-triton"
    old = Device("cuda", "sm_75", "a T4")
    assert "sm_80" in OP.reasons(call(device=old))["cudnn"]
    with pytest.raises(UnsupportedError, match="cudnn.*packed"):
        OP.choose(call(**PACKED), "cudnn")


def tensors(length_q, length_k, heads=(4, 2), *, offsets=None, head_dim=16):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, dout."""
    generator = torch.Generator().manual_seed(0)
    batch = () if offsets else (2,)

    def random(length, n_heads):
        return torch.randn(*batch, length, n_heads, head_dim, generator=generator)

    packing = [torch.tensor(each, dtype=torch.int32) for each in offsets] if offsets else [None, None]
    q, dout = random(length_q, heads[0]), random(length_q, heads[0])
    return q, random(length_k, heads[1]), random(length_k, heads[1]), *packing, dout


def agrees_with_the_reference(module, inputs, asked):
    q, k, v, cu_q, cu_k, dout = inputs
    needs = ("q", "k", "v")
    want_out, want_lse = reference.forward(q, k, v, cu_q, cu_k, *NO_FEATURES, asked)
    saved = (q, k, v, cu_q, cu_k, *NO_FEATURES, want_out, want_lse)
    want = reference.backward(dout, None, *saved, needs=needs, params=asked)
    results = module.forward(q, k, v, cu_q, cu_k, *NO_FEATURES, asked)
    named = dict(zip(("out", "lse", *module.AUXILIARY), results, strict=True))
    named |= {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    found = module.backward(dout, None, *[named[each] for each in module.SAVED], needs=needs, params=asked)
    for ours, theirs in zip((*results[:2], *found), (want_out, want_lse, *want), strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(module.backward(dout, None, *[named[e] for e in module.SAVED], needs=("k",), params=asked)[0],
                       found[1])  # fmt: skip


# ---- torch's own operators


def stand_in_for_aten(monkeypatch, name, answer):
    """Replace aten::<name>; `answer` gets the arguments by the names of the installed torch's schema."""
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]

    def operator(*args, **kwargs):
        given = dict(zip(names, args, strict=False))
        assert not given.keys() & kwargs.keys() and kwargs.keys() <= set(names)
        return answer(types.SimpleNamespace(**given | kwargs))

    operator.default = getattr(torch.ops.aten, name).default  # torch looks it up when it imports more of itself
    monkeypatch.setattr(torch.ops.aten, name, operator)


def aten_stand_ins(monkeypatch, kind, shape_lse):
    def asked(given):
        assert given.dropout_p == 0.0 and given.attn_bias is None
        return params(given.is_causal, scale=given.scale)

    def forward(given):
        q, k, v = (each.transpose(1, 2) for each in (given.query, given.key, given.value))
        out, lse = reference.forward(q, k, v, None, None, *NO_FEATURES, asked(given))
        return out.transpose(1, 2), shape_lse(lse), *[None] * (2 if kind == "efficient" else 7)

    def backward(given):
        dout = given.grad_out_ if kind == "efficient" else given.grad_out
        q, k, v, out, dout = (e.transpose(1, 2) for e in (given.query, given.key, given.value, given.out, dout))
        lse = given.logsumexp
        assert lse.shape == shape_lse(torch.empty(q.shape[0], q.shape[2], q.shape[1])).shape
        if kind != "efficient":
            assert (given.max_q, given.max_k) == (q.shape[1], k.shape[1])
        lse = lse.reshape(*lse.shape[:2], -1)[..., : q.shape[1]]
        want = reference.forward(q, k, v, None, None, *NO_FEATURES, asked(given))
        torch.testing.assert_close((out, lse), want)
        found = reference.backward(
            dout, None, q, k, v, None, None, *NO_FEATURES, out, lse, needs=("q", "k", "v"), params=asked(given)
        )
        return *[each.transpose(1, 2) for each in found], *[None] * (kind == "efficient")

    def with_bias(answer):
        def wrapped(given):
            given.attn_bias = getattr(given, "attn_bias", None)
            return answer(given)

        return wrapped

    stand_in_for_aten(monkeypatch, f"_scaled_dot_product_{kind}_attention", with_bias(forward))
    stand_in_for_aten(monkeypatch, f"_scaled_dot_product_{kind}_attention_backward", with_bias(backward))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("module", "kind", "heads", "shape_lse"),
    [
        (vendor_sdpa_cudnn, "cudnn", (4, 2), lambda lse: lse[..., None]),
        (vendor_sdpa_flash, "flash", (4, 2), lambda lse: lse),
        (vendor_sdpa_efficient, "efficient", (2, 2), lambda lse: torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))),
    ],
)
def test_torchs_operators_get_the_layout_scale_and_lse_that_they_want(
    monkeypatch, module, kind, heads, shape_lse, causal
):
    aten_stand_ins(monkeypatch, kind, shape_lse)
    agrees_with_the_reference(module, tensors(20, 20, heads), params(causal))


@pytest.mark.parametrize("module", SDPA)
def test_the_installed_torch_accepts_every_argument(module):
    q, k, v, dout = (torch.empty(2, 40, 4, 64, dtype=torch.bfloat16, device="meta") for _ in range(4))
    asked = params(causal=True)
    results = module.forward(q, k, v, None, None, *NO_FEATURES, asked)
    named = dict(zip(("out", "lse", *module.AUXILIARY), results, strict=True)) | {"q": q, "k": k, "v": v}
    assert (named["out"].shape, named["lse"].shape) == (q.shape, (2, 4, 40))
    if module.AUXILIARY:
        fakes = module.fake_auxiliary(q, k, v, None, None, *NO_FEATURES, asked)
        assert [each.shape for each in fakes] == [each.shape for each in results[2:]]
    found = module.backward(dout, None, *[named[e] for e in module.SAVED], needs=("q", "k", "v"), params=asked)
    assert [each.shape for each in found] == [q.shape] * 3
    assert all(each.is_contiguous() for each in (*results, *found))


# ---- packages: stand-ins with the signatures of flash-attn 2.8.3, flash-attn-4 4.0.0b36 and xFormers 0.0.35

OFFSETS = ((0, 7, 7, 20), (0, 3, 9, 25))
CASES = {
    "dense": (tensors(20, 20), params()),
    "causal, more queries than keys": (tensors(20, 12), params(causal=True)),
    "packed": (tensors(20, 25, offsets=OFFSETS), params()),
    "packed, causal, spare rows": (tensors(24, 30, offsets=OFFSETS), params(causal=True, lengths=(13, 16))),
}
SOFT_CAPS = {
    "soft cap": (tensors(20, 26), params(cap=1.5)),
    "packed, soft cap": (tensors(20, 25, offsets=OFFSETS), params(causal=True, cap=1.5)),
}
WINDOWS = {
    "window": (tensors(20, 26), params(left=4, right=2)),
    "causal window": (tensors(20, 20), params(causal=True, left=5)),
    "packed, window": (tensors(20, 25, offsets=OFFSETS), params(left=4, right=-1)),
}


def within(cu_seqlens, tensor):
    """Rows that belong to documents; the rest is the library's to leave unwritten."""
    return tensor[: int(cu_seqlens[-1])]


def install(monkeypatch, **modules):
    for name, members in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


# fmt: off  (signatures as the library has them)
def flash_attn_2():
    def asked(scale, causal, left, right, cap, deterministic=False):
        return params(causal, left, right, scale, deterministic=deterministic, cap=cap)

    def forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        cu_q=None,
        cu_k=None,
    ):
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        options = asked(softmax_scale, causal, window_size_left, window_size_right, softcap)
        out, lse = reference.forward(q, k, v, cu_q, cu_k, *NO_FEATURES, options)
        rows = slice(int(cu_q[-1]), None) if cu_q is not None else slice(0, 0)
        lse = torch.where(lse == -torch.inf, torch.inf, lse)  # what the kernels do
        lse[..., rows] = -torch.inf  # what zero_tensors does
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max() and zero_tensors
        return forward(
            q,
            k,
            v,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            return_softmax,
            cu_seqlens_q,
            cu_seqlens_k,
        )

    def backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        cu_q=None,
        cu_k=None,
    ):
        assert (dropout_p, alibi_slopes) == (0.0, None) and not (softmax_lse == -torch.inf).any()
        options = asked(softmax_scale, causal, window_size_left, window_size_right, softcap, deterministic)
        lse = torch.where(softmax_lse == torch.inf, -torch.inf, softmax_lse)
        needs = ("q", "k", "v")
        saved = (q, k, v, cu_q, cu_k, *NO_FEATURES, out, lse)
        found = reference.backward(dout, None, *saved, needs=needs, params=options)
        for target, each, cu in zip((dq, dk, dv), found, (cu_q, cu_k, cu_k), strict=True):
            target[slice(None) if cu is None else slice(int(cu[-1]))] = each if cu is None else within(cu, each)

    def varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            dq,
            dk,
            dv,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            deterministic,
            rng_state,
            cu_seqlens_q,
            cu_seqlens_k,
        )

    return {
        "_flash_attn_forward": forward,
        "_flash_attn_varlen_forward": varlen_forward,
        "_flash_attn_backward": backward,
        "_flash_attn_varlen_backward": varlen_backward,
    }


# fmt: on


@pytest.mark.parametrize("name", CASES | WINDOWS | SOFT_CAPS)
def test_flash_attn_2_gets_what_its_signature_asks_for(monkeypatch, name):
    install(monkeypatch, flash_attn={}, flash_attn__flash_attn_interface=flash_attn_2())
    agrees_with_the_reference(vendor_flash_attn, *(CASES | WINDOWS | SOFT_CAPS)[name])


def flash_attn_4():
    def asked(scale, causal, left, right, cap):
        assert left is None or left >= 0
        assert right is None or right >= 0
        return params(causal, -1 if left is None else left, -1 if right is None else right, scale, cap=cap or 0.0)

    def fwd(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse, softcap=None,
            cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, out=None,
            lse=None):  # fmt: skip
        options = asked(softmax_scale, causal, window_size_left, window_size_right, softcap)
        found = reference.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *NO_FEATURES, options)
        assert return_lse
        if cu_seqlens_q is None:
            return *found, None, None, None
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        rows = slice(int(cu_seqlens_q[-1]))
        out[rows], lse[:, rows] = found[0][rows], found[1][:, rows]
        return out, lse, None, None, None

    def bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
            window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            deterministic=False, dq=None, dk=None, dv=None):  # fmt: skip
        options = asked(softmax_scale, causal, window_size_left, window_size_right, softcap)
        needs = ("q", "k", "v")
        found = reference.backward(
            dout, None, q, k, v, cu_seqlens_q, cu_seqlens_k, *NO_FEATURES, out, lse, needs=needs, params=options
        )
        if cu_seqlens_q is None:
            return found
        offsets = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
        for target, each, cu in zip((dq, dk, dv), found, offsets, strict=True):
            target[: int(cu[-1])] = within(cu, each)
        return dq, dk, dv

    return {"_flash_attn_fwd": fwd, "_flash_attn_bwd": bwd}


@pytest.mark.parametrize("name", CASES | WINDOWS | SOFT_CAPS)
def test_flash_attn_4_gets_what_its_signature_asks_for(monkeypatch, name):
    install(monkeypatch, flash_attn={}, flash_attn__cute={}, flash_attn__cute__interface=flash_attn_4())
    agrees_with_the_reference(vendor_flash_attn_4, *(CASES | WINDOWS | SOFT_CAPS)[name])


class BlockDiagonal:
    """xFormers' block-diagonal mask: from_seqlens and make_causal_from_bottomright."""

    def __init__(self, lengths, causal=False):
        self.lengths, self.causal = lengths, causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls((q_seqlen, kv_seqlen))

    def make_causal_from_bottomright(self):
        return type(self)(self.lengths, causal=True)

    def offsets(self):
        return [torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in self.lengths]


def xformers_fmha():
    class BottomRight:
        pass

    flash = types.SimpleNamespace(FwOp=object(), BwOp=object())

    def unpack(bias, scale, *given):
        causal = isinstance(bias, BottomRight) or getattr(bias, "causal", False)
        if not isinstance(bias, BlockDiagonal):
            return [*given], [None, None], params(causal, scale=scale)
        assert all(each.shape[0] == 1 for each in given)
        assert sum(bias.lengths[0]) == given[0].shape[1]
        return [each[0] for each in given], bias.offsets(), params(causal, scale=scale)

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert op is flash.FwOp
        inputs, offsets, asked = unpack(attn_bias, scale, query, key, value)
        out, lse = reference.forward(*inputs, *offsets, *NO_FEATURES, asked)
        lse = torch.where(lse == -torch.inf, torch.inf, lse)
        return (out[None], lse[None]) if offsets[0] is not None else (out, lse)

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert op is flash.BwOp and not (lse == -torch.inf).any()
        (q, k, v, dout, out, lse), offsets, asked = unpack(attn_bias, scale, query, key, value, grad, output, lse)
        lse, needs = torch.where(lse == torch.inf, -torch.inf, lse), ("q", "k", "v")
        saved = (q, k, v, *offsets, *NO_FEATURES, out, lse)
        found = reference.backward(dout, None, *saved, needs=needs, params=asked)
        return found if offsets[0] is None else tuple(each[None] for each in found)

    bias = types.SimpleNamespace(LowerTriangularFromBottomRightMask=BottomRight, BlockDiagonalMask=BlockDiagonal)
    return {
        "flash": flash,
        "attn_bias": bias,
        "memory_efficient_attention_forward_requires_grad": forward,
        "memory_efficient_attention_backward": backward,
    }


@pytest.mark.parametrize("name", CASES)
def test_xformers_gets_its_masks_and_one_document_after_the_other(monkeypatch, name):
    install(monkeypatch, xformers={}, xformers__ops={}, xformers__ops__fmha=xformers_fmha())
    agrees_with_the_reference(vendor_xformers, *CASES[name])
