"""Names, order and defaults of every function that flash-attn 2.8.3 has in Python and this package covers."""

import importlib
import inspect

import pytest
import torch

import tilestack.compat.flash_attn as package

REQUIRED = inspect.Parameter.empty
TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
NORM = (
    "residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False, "
    "residual_in_fp32=False, zero_centered_weight=False, {rms}return_dropout_mask=False, out_dtype=None, out=None, "
    "residual_out=None"
)
NORM_REF = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, "
    "prenorm=False, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False"
)
OFFSETS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SCORES = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
SAVED = "dout, q, k, v, out, softmax_lse, dq, dk, dv"

# module -> function -> its parameters, as one would write them in its definition
SIGNATURES = {
    "flash_attn_interface": {
        "flash_attn_func": f"q, k, v, {TAIL}",
        "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
        "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
        "flash_attn_varlen_func": f"q, k, v, {OFFSETS}, {TAIL}, block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {OFFSETS}, {TAIL}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
            "return_softmax_lse=False"
        ),
        "_flash_attn_forward": f"q, k, v, {SCORES}, return_softmax",
        "_flash_attn_varlen_forward": (
            f"q, k, v, {OFFSETS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
            "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
            "zero_tensors=False"
        ),
        "_flash_attn_backward": f"{SAVED}, {SCORES}, deterministic, rng_state=None",
        "_flash_attn_varlen_backward": (
            f"{SAVED}, {OFFSETS}, {SCORES}, deterministic, rng_state=None, zero_tensors=False"
        ),
        "_get_block_size_n": "device, head_dim, is_dropout, is_causal",
        "maybe_contiguous": "x",
        "round_multiple": "x, m",
    },
    "bert_padding": {
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
        "pad_input": "hidden_states, indices, batch, seqlen",
    },
    "layers.rotary": {
        "rotate_half": "x, interleaved=False",
        "apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
        "apply_rotary_emb": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
        ),
        "apply_rotary_emb_func": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
        ),
        "apply_rotary_emb_qkv_": (
            "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"
        ),
        "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
        "RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
        "RotaryEmbedding.forward": "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None",
    },
    "ops.triton.rotary": {
        "apply_rotary": (
            "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
            "conjugate=False"
        ),
    },
    "ops.triton.layer_norm": {
        "layer_norm_fn": f"x, weight, bias, {NORM.format(rms='is_rms_norm=False, ')}",
        "rms_norm_fn": f"x, weight, bias, {NORM.format(rms='')}",
        "layer_norm_linear_fn": (
            "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6, prenorm=False, "
            "residual_in_fp32=False, is_rms_norm=False"
        ),
        "layer_norm_ref": NORM_REF,
        "rms_norm_ref": NORM_REF,
        "RMSNorm": "hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None",
        "RMSNorm.forward": "self, x, residual=None, prenorm=False, residual_in_fp32=False",
    },
    "ops.triton.cross_entropy": {
        "cross_entropy_loss": (
            "logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
            "ignore_index=-100, inplace_backward=False, process_group=None"
        ),
    },
    "losses.cross_entropy": {
        "CrossEntropyLoss": (
            "ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
            "inplace_backward=False, process_group=None, return_z_loss=False"
        ),
        "CrossEntropyLoss.forward": "self, input, target, precomputed_lse=None",
    },
}
# what C++ was called with by position: how many arguments
POSITIONAL = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


def parameters(function):
    return [(each.name, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("place", [f"{module}:{name}" for module, names in SIGNATURES.items() for name in names])
def test_a_function_has_the_parameters_of_flash_attn(place):
    module, name = place.split(":")
    found = importlib.import_module(f"{package.__name__}.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    scope = {}
    exec(f"def expected({SIGNATURES[module][name]}): ...", scope)
    assert parameters(found) == parameters(scope["expected"])
    kinds = {each.kind for each in inspect.signature(found).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", POSITIONAL)
def test_the_compiled_functions_take_as_many_positions(name):
    interface = importlib.import_module(f"{package.__name__}.flash_attn_interface")
    assert len(parameters(getattr(interface.flash_attn_gpu, name))) == POSITIONAL[name]


def test_the_package_shows_seven_functions_and_the_version_that_others_ask_for():
    assert package.__version__ == "2.8.3"
    assert package.__all__ == sorted(
        name for name in SIGNATURES["flash_attn_interface"] if name.startswith("flash_attn_")
    )


def test_the_private_ops_have_a_second_name():
    interface = importlib.import_module(f"{package.__name__}.flash_attn_interface")
    for name in (
        "flash_attn_forward",
        "flash_attn_backward",
        "flash_attn_varlen_forward",
        "flash_attn_varlen_backward",
    ):
        assert parameters(getattr(interface, f"_wrapped_{name}")) == parameters(getattr(interface, f"_{name}"))


CLASSES = {
    "FlashAttnFunc": ("q k v", "flash_attn_func", False),
    "FlashAttnKVPackedFunc": ("q kv", "flash_attn_kvpacked_func", False),
    "FlashAttnQKVPackedFunc": ("qkv", "flash_attn_qkvpacked_func", False),
    "FlashAttnVarlenFunc": ("q k v", "flash_attn_varlen_func", True),
    "FlashAttnVarlenKVPackedFunc": ("q kv", "flash_attn_varlen_kvpacked_func", True),
    "FlashAttnVarlenQKVPackedFunc": ("qkv", "flash_attn_varlen_qkvpacked_func", True),
}


@pytest.mark.parametrize("name", CLASSES)
def test_apply_of_an_autograd_name_is_its_function_with_recording_as_the_last_argument(name):
    interface = importlib.import_module(f"{package.__name__}.flash_attn_interface")
    given, function, is_packed = CLASSES[name]
    rows = (5,) if is_packed else (1, 5)
    parts = {"q": (), "k": (), "v": (), "kv": (2,), "qkv": (3,)}
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*rows, *parts[each], 2, 8, generator=generator).bfloat16().requires_grad_()
        for each in given.split()
    ]
    cu = torch.tensor([0, 5], dtype=torch.int32)
    offsets = () if not is_packed else (cu, 5) if given == "qkv" else (cu, cu, 5, 5)
    tail = (0.0, 0.4, True, (3, -1), 0.0, None, False, False, *([None] if name == "FlashAttnVarlenFunc" else []))
    expected = getattr(package, function)(*tensors, *offsets, *tail)
    recorded, unrecorded = (getattr(interface, name).apply(*tensors, *offsets, *tail, each) for each in (True, False))
    assert torch.equal(recorded, expected) and torch.equal(unrecorded, expected)
    assert recorded.requires_grad and not unrecorded.requires_grad
