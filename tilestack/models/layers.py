"""The layers of Qwen3-MoE over our ops; each takes the place of transformers' class of the same name."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe as original

from tilestack.kernels import RouterOutput, linear_cross_entropy, qk_norm_rope, rms_norm, router, swiglu
from tilestack.models.cache_name import takes_cache
from tilestack.models.projections import project
from tilestack.models.registration import NAME, autocast, kernels_of
from tilestack.models.replacement import replaces
from tilestack.models.sharded_sequence import ShardedSequence
from tilestack.models.token_dispatch import TokenDispatcher


@replaces(original.Qwen3MoeRMSNorm)
class Qwen3MoeRMSNorm(original.Qwen3MoeRMSNorm):
    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise [..., H]; with a residual, add it first and return (normalised, sum)."""
        if residual is not None:  # autocast gives an update in bf16 beside a residual stream in float32
            hidden_states = hidden_states.to(residual.dtype)
        weight = self.weight.to(hidden_states.dtype)
        choice = kernels_of(self).rms_norm
        return rms_norm(hidden_states, weight, residual=residual, eps=self.variance_epsilon, implementation=choice)


@replaces(original.Qwen3MoeAttention)
class Qwen3MoeAttention(original.Qwen3MoeAttention):
    """Reads the weights of q_norm and k_norm itself, so for ZeRO-3 it is a leaf."""

    sequence: ShardedSequence | None = None  # set where each rank has a part of every row

    @takes_cache
    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        rows = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (each.view(rows) for each in project(hidden_states, self.q_proj, self.k_proj, self.v_proj))
        q, k = qk_norm_rope(
            q,
            k,
            self.q_norm.weight.to(q.dtype),
            self.k_norm.weight.to(q.dtype),
            *position_embeddings,
            eps=self.q_norm.variance_epsilon,
            implementation=kernels_of(self).qk_norm_rope,
        )
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # views: nothing is copied
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, original.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, q, k, v, attention_mask,
            dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), weights


@replaces(original.Qwen3MoeMLP)
class Qwen3MoeMLP(original.Qwen3MoeMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up, implementation=kernels_of(self).swiglu))


@replaces(original.Qwen3MoeTopKRouter)
class Qwen3MoeTopKRouter(original.Qwen3MoeTopKRouter):
    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterOutput]:
        """(logits [T, E], what the router op gives); the statistics count the tokens of token_mask [T]."""
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        routed = router(
            logits,
            top_k=self.top_k,
            normalize=self.norm_topk_prob,
            token_mask=token_mask,
            implementation=kernels_of(self).router,
        )
        return logits, routed


@replaces(original.Qwen3MoeSparseMoeBlock)
class Qwen3MoeSparseMoeBlock(original.Qwen3MoeSparseMoeBlock):
    dispatcher: TokenDispatcher | None = None  # set where the experts are split over ranks

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        router_statistics: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, H] -> [B, S, H]; with router_statistics also tokens_per_expert [E] and probability_sum [E]."""
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, routed = self.gate(x, token_mask)
        ids, weights = routed.topk_ids, routed.topk_weights
        if not _runs_on_our_op(self.experts):
            ids, weights = ids.long(), weights.to(x.dtype)
        if self.dispatcher is None:
            out = self.experts(x, ids, weights)
        else:
            out = self.dispatcher(x, ids, weights, self._own_experts)
        out = out.view_as(hidden_states)
        return (out, routed.tokens_per_expert, routed.probability_sum) if router_statistics else out

    def _own_experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
        ids.most_routes = most  # transformers' interface of experts takes three tensors and nothing else
        return self.experts(x, ids, weights)


def _runs_on_our_op(experts: nn.Module) -> bool:
    """Whether the experts, perhaps inside a wrapper (PEFT), take what our router gives."""
    if not isinstance(experts, original.Qwen3MoeExperts):
        experts = next(each for each in experts.modules() if isinstance(each, original.Qwen3MoeExperts))
    return experts.config._experts_implementation == NAME


@replaces(original.Qwen3MoeDecoderLayer)
class Qwen3MoeDecoderLayer(original.Qwen3MoeDecoderLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        update: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        router_statistics: bool = False,
        deferred: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """[B, S, H] -> [B, S, H]; with router_statistics an MoE layer also gives its two statistics.

        They are results, not a side effect, so that reentrant checkpointing gives them gradients.

        update: what the layer before left to be added to hidden_states; the first norm adds it while it is at it.
        deferred: give (hidden_states, update, *statistics), and leave the last addition to the next norm.
        """
        # by position: for a leaf that gets only keywords, ZeRO-3 takes the gradients before they are there
        if update is None:
            normalised, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            normalised, residual = self.input_layernorm(update, residual=hidden_states)
        update, _ = self.self_attn(normalised, **kwargs)
        normalised, residual = self.post_attention_layernorm(update, residual=residual)
        statistics = ()
        if router_statistics and isinstance(self.mlp, original.Qwen3MoeSparseMoeBlock):
            update, *statistics = self.mlp(normalised, token_mask, router_statistics=True)
        else:
            update = self.mlp(normalised)
        if deferred:
            return residual, update, *statistics
        return (residual + update, *statistics) if statistics else residual + update


@replaces(nn.Linear, child=(original.Qwen3MoeForCausalLM, "lm_head"))
class LMHead(nn.Linear):
    """The LM head and the loss in one module: where ZeRO-3 gathers the weight, it is there for both."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [..., V]; with labels [...] (nothing is shifted here) the cross entropy instead, without the logits.

        num_items divides the summed loss; None divides by the number of labels that are not -100.
        """
        if labels is None:
            return super().forward(hidden_states)
        hidden, weight = autocast(hidden_states.flatten(0, -2), self.weight)
        return linear_cross_entropy(
            hidden,
            weight,
            labels.flatten(),
            num_items=num_items,
            weight_gradient_sum=self._gradient_sum(hidden, weight),
            implementation=kernels_of(self).linear_cross_entropy,
        )

    def _gradient_sum(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Where an engine sums the gradients of micro-batches (`weight.gradient_sum`), unless somebody hooks them."""
        watched = weight is not self.weight or weight._backward_hooks or torch.compiler.is_compiling()
        return None if watched or not hidden.requires_grad else getattr(weight, "gradient_sum", None)


# Modules that read their children's parameters themselves: DeepSpeed gathers these whole (set_z3_leaf_modules).
ZERO3_LEAF_CLASSES = (Qwen3MoeAttention, Qwen3MoeSparseMoeBlock)
