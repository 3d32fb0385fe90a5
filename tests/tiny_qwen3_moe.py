"""A Qwen3-MoE small enough for a test, and the comparison of ours with transformers' own."""

import copy

import torch
from torch.overrides import TorchFunctionMode
from transformers import Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Plain

from tilestack import Qwen3MoeForCausalLM

VOCABULARY = 97


def tiny_config(**changes) -> Qwen3MoeConfig:
    """Two layers, GQA with 4 heads over 2, 8 experts of which a token takes 2."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,  # large enough that attention and routing matter
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return Qwen3MoeConfig(**(settings | changes))


def plain_model(seed: int = 0, **changes) -> Plain:
    """Untouched transformers, in training mode, every parameter random (norms too)."""
    torch.manual_seed(seed)
    model = Plain(tiny_config(**changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


def ours_like(plain: Plain, **arguments) -> Qwen3MoeForCausalLM:
    """Our class with the weights of a plain model."""
    ours = Qwen3MoeForCausalLM(plain.config, **arguments).train(plain.training)
    ours.load_state_dict(plain.state_dict())
    return ours


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the padding and end tokens."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Float64(TorchFunctionMode):
    """Runs code that asks for float32 in float64: transformers' norms, softmax and rotary angles upcast by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        swap = {torch.float32: torch.float64}
        args = [swap.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


def results(model, inputs: dict, valid: torch.Tensor | None = None) -> tuple[dict, dict]:
    """The losses; logits at the tokens that count, and every parameter's gradient."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    losses = {"loss": outputs.loss.detach()}
    if outputs.aux_loss is not None:
        losses["aux_loss"] = outputs.aux_loss.detach()
    tensors = {"logits": (outputs.logits if valid is None else outputs.logits[valid.bool()]).detach()}
    return losses, tensors | {f"gradient of {name}": each.grad for name, each in model.named_parameters()}


Errors = tuple[dict[str, float], dict[str, float]]  # of each tensor, relative: ours, and those of transformers


def assert_same(ours, plain: Plain, inputs: dict, plain_inputs: dict | None = None, valid=None) -> None:
    """Ours agrees with transformers to rounding.

    Losses: to torch's tolerance for float32. Logits and gradients: against transformers in float64, and relative to the
    tensor's largest value, the worst of ours is off by at most twice what transformers' worst is in float32.
    """
    assert_within_twice(both_errors(ours, plain, inputs, plain_inputs, valid))


def assert_within_twice(*draws: Errors) -> None:
    """The rule above, of one model or of several together."""
    name, worst = max((each for ours, _ in draws for each in ours.items()), key=lambda each: each[1])
    budget = 2 * max(error for _, eager in draws for error in eager.values())
    assert worst <= budget, f"{name}: relative error {worst:.3g} is over the budget {budget:.3g}"


def both_errors(ours, plain: Plain, inputs: dict, plain_inputs: dict | None = None, valid=None) -> Errors:
    """The errors of logits and gradients; the losses are asserted."""
    plain_inputs = inputs if plain_inputs is None else plain_inputs
    oracle = copy.deepcopy(plain).double()
    oracle.set_experts_implementation("eager")  # the others have no float64
    with Float64():
        exact_losses, exact = results(oracle, plain_inputs, valid)
    _, eager = results(plain, plain_inputs, valid)
    losses, found = results(ours, inputs | {"return_logits": True}, valid)
    for name in exact_losses:
        torch.testing.assert_close(
            losses[name], exact_losses[name].float(), msg=lambda text, name=name: f"{name}: {text}"
        )
    return relative_errors(found, exact), relative_errors(eager, exact)


def relative_errors(found: dict, exact: dict) -> dict[str, float]:
    """The largest error of each tensor, divided by the tensor's largest value."""
    assert found.keys() == exact.keys()
    return {name: ((found[name].double() - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact}
