"""Qwen3MoeForCausalLM: transformers' class, with our ops in it from the start."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen3_moe import modeling_qwen3_moe as original
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tilestack.kernels import load_balancing_loss
from tilestack.models import cache_name
from tilestack.models.config_v4 import add_v4_keys
from tilestack.models.enable import enable
from tilestack.models.kernel_choice import KernelChoice
from tilestack.models.layers import LMHead, Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm
from tilestack.models.loading import check_folder, check_loaded
from tilestack.models.outputs import MoeCausalLMOutput, MoeModelOutput
from tilestack.models.packing import Packing, find_packing, positions_of
from tilestack.models.projections import is_hooked
from tilestack.models.recomputation import inputs_on_host
from tilestack.models.registration import NAME
from tilestack.models.replacement import replaces
from tilestack.models.rotary import restore_rotary_frequencies
from tilestack.models.sharded_sequence import ShardedSequence

DEFAULTS = (None, "sdpa", "grouped_mm")  # what transformers fills in where the user named nothing


class TransformersOwn:
    """Answers what transformers finds out for its own classes from their name and the text of their source file."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # custom code gets no conversion from and to the checkpoints of the hub

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


@replaces(original.Qwen3MoeModel)
class Qwen3MoeModel(TransformersOwn, original.Qwen3MoeModel):
    sequence: ShardedSequence | None = None  # set where each rank has a part of every row

    @cache_name.takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        router_statistics: bool = False,
        **kwargs,
    ) -> MoeModelOutput:
        """As in transformers; with router_statistics the output carries the statistics of every MoE layer."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = self._positions(hidden, position_ids, cache, kwargs)
        mask = self._mask(hidden, attention_mask, positions, cache)
        kwargs["packing"] = self._packing(hidden, mask, position_ids, kwargs)
        position_embeddings = self.rotary_emb(hidden, position_ids=positions)
        token_mask = _token_mask(attention_mask, hidden.shape[1]) if router_statistics else None
        layers = self.layers[: self.config.num_hidden_layers]
        deferred = self._defers_additions(layers)
        update, statistics = None, []
        offloads = inputs_on_host(self) and self.training and torch.is_grad_enabled()
        keeps = torch.autograd.graph.save_on_cpu(pin_memory=True) if offloads else contextlib.nullcontext()
        for layer in layers:
            with keeps:
                hidden = layer(
                    *((hidden,) if update is None else (hidden, update)),
                    attention_mask=mask,
                    position_ids=positions,
                    **{cache_name.NAME: cache},
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    token_mask=token_mask,
                    router_statistics=router_statistics,
                    deferred=deferred,
                    **kwargs,
                )
            if deferred:
                hidden, update, *of_layer = hidden
            else:
                hidden, *of_layer = hidden if isinstance(hidden, tuple) else (hidden,)
            statistics += [of_layer] if of_layer else []
        tokens_per_expert, probability_sum = (
            map(torch.stack, zip(*statistics, strict=True)) if statistics else (None, None)
        )
        return MoeModelOutput(
            last_hidden_state=self.norm(hidden) if update is None else self.norm(update, residual=hidden)[0],
            **{cache_name.NAME: cache},
            tokens_per_expert=tokens_per_expert,
            probability_sum=probability_sum,
        )

    def _defers_additions(self, layers) -> bool:
        """Whether the last addition of a layer is left to the next norm, which then reads the sum no second time.

        Not where somebody looks at the layers' outputs, nor under checkpointing, which would keep both terms.
        """
        checkpointing = self.training and any(each.gradient_checkpointing for each in layers)
        ours = all(isinstance(each, Qwen3MoeDecoderLayer) and not is_hooked(each) for each in layers)
        return ours and isinstance(self.norm, Qwen3MoeRMSNorm) and not is_hooked(self.norm) and not checkpointing

    def _positions(self, hidden, position_ids, cache, kwargs) -> torch.Tensor:
        if position_ids is not None:
            return position_ids
        batch, seqlen = hidden.shape[:2]
        if kwargs.get("cu_seq_lens_q") is not None:
            return positions_of(kwargs["cu_seq_lens_q"], batch, seqlen)
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(seqlen, device=hidden.device) + past).unsqueeze(0)

    def _mask(self, hidden, attention_mask, positions, cache):
        windowed = self.config.sliding_window is not None
        make = create_sliding_window_causal_mask if windowed else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            **{cache_name.NAME: cache},
            # transformers would look for documents in them, and wait for the device; we do that ourselves
            position_ids=None if self.config._attn_implementation == NAME else positions,
        )

    def _packing(self, hidden, mask, position_ids, kwargs) -> Packing | None:
        """The documents of whole sequences under our own attention; every other case has them in its mask."""
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        implementation = self.config._attn_implementation
        if implementation != NAME:
            if cu_seqlens is not None and "flash" not in implementation:
                raise ValueError(
                    f"cu_seq_lens_q: attn_implementation={implementation!r} does not know it and would attend "
                    f"across documents; use attn_implementation={NAME!r}, or give position_ids that restart"
                )
            return None
        if mask is not None and mask.dim() == 4:
            if cu_seqlens is not None:
                raise ValueError(
                    "cu_seq_lens_q describes whole sequences; it cannot go with a 4-D attention_mask or a filled cache"
                )
            return None
        batch, seqlen = hidden.shape[:2]
        if self.sequence is not None:
            seqlen *= self.sequence.ranks
        return find_packing(batch, seqlen, mask, position_ids, cu_seqlens, max_seqlen=kwargs.get("max_length_q"))


def _token_mask(attention_mask: torch.Tensor | None, seqlen: int) -> torch.Tensor | None:
    """[B * S] bool: the tokens that the load-balancing loss counts; None for all."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -seqlen:].reshape(-1).bool()


@replaces(original.Qwen3MoeForCausalLM)
class Qwen3MoeForCausalLM(TransformersOwn, original.Qwen3MoeForCausalLM):
    """transformers' Qwen3MoeForCausalLM over tilestack's ops: same parameters, checkpoints and outputs.

    kernels: which implementation of each op to use (KernelChoice, or a mapping from op to implementation); by default
        the dispatcher chooses. Also an argument of from_pretrained.
    An attn_implementation or experts_implementation other than transformers' defaults is respected.
    """

    def __init__(self, config, kernels: KernelChoice | Mapping[str, str] | None = None):
        kernels = KernelChoice.of(kernels)
        config = copy.deepcopy(config)  # enable() writes to it, and other models may share it
        attention, experts = config._attn_implementation, config._experts_implementation
        super().__init__(config)
        enable(self, kernels, attention=attention in DEFAULTS, experts=experts in DEFAULTS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """As in transformers, with `kernels`, and strict.

        Raises ValueError for a checkpoint that is of another architecture, lacks parameters, or has a broken shard.
        """
        source, info_wanted = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if source is not None and Path(source).is_dir():
            check_folder(Path(source, kwargs.get("subfolder", "")))
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        check_loaded(source, info)
        if kwargs.get("attn_implementation") == "sdpa":
            model.set_attn_implementation("sdpa")
        if kwargs.get("experts_implementation") == "grouped_mm":
            model.set_experts_implementation("grouped_mm")
        restore_rotary_frequencies(model)
        return (model, info) if info_wanted else model

    def shard_sequence(self, sequence: ShardedSequence | None) -> None:
        """From now on every row of tokens is this rank's part of a row that `sequence.ranks` ranks share.

        forward then needs cu_seq_lens_q of the whole rows, position_ids and shift_labels of the part. None: rows are
        whole again.
        """
        for module in self.modules():
            if isinstance(module, (original.Qwen3MoeModel, original.Qwen3MoeAttention)):
                module.sequence = sequence

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers; config.json also gets the keys that transformers 4 and stacks built on it read."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            add_v4_keys(save_directory)

    @cache_name.takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        output_aux_loss: bool = False,
        aux_loss_divisor: float | torch.Tensor = 1,
        num_items_in_batch: float | torch.Tensor | None = None,
        **kwargs,
    ) -> MoeCausalLMOutput:
        """transformers' forward. What differs, and what is new:

        attention_mask: [B, S], 0 for padding. A mask [B, 1, Sq, Sk] works, over transformers' SDPA.
        position_ids: [B or 1, S]; where they restart, a document begins, and no token attends across, also with
            use_cache, an all-ones mask or B > 1.
        cu_seq_lens_q (in kwargs), max_length_q: where the documents begin among the B * S tokens, [documents + 1] on
            the device: then nothing is read from the device. position_ids default to restarting with each document;
            an attention_mask beside it only says which tokens the load-balancing loss counts.
        labels: [B, S], shifted inside as in transformers (shift_labels, in kwargs: shifted already). Given labels,
            `logits` is None and no cache is kept unless asked for.
        return_logits: True: logits with the loss. False: none. None: if there are no labels or logits_to_keep is set.
        num_items_in_batch: divides the summed cross entropy; None: the number of labels that count in this batch.
        output_router_logits: as in transformers: router_logits, aux_loss, and with labels the loss includes it.
        output_aux_loss: the same without keeping router_logits: O(E) memory a layer.
        aux_loss_divisor: the loss is ce_loss + router_aux_loss_coef * aux_loss / aux_loss_divisor. For the mean over
            micro-batches and ranks where gradients are summed: accumulation steps times ranks.

        Returns transformers' output with `ce_loss` and, if there is an aux_loss, `tokens_per_expert`.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # as a named argument Trainer would take it for a label to wait for
        labelled = labels is not None or shift_labels is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{cache_name.NAME: cache},
            inputs_embeds=inputs_embeds,
            use_cache=False if labelled and use_cache is None else use_cache,
            output_router_logits=output_router_logits,
            router_statistics=output_router_logits or output_aux_loss,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if return_logits is None:
            return_logits = not labelled or not isinstance(logits_to_keep, int) or logits_to_keep != 0
        logits = ce_loss = loss = aux_loss = tokens_per_expert = None
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        if labelled:
            loss = ce_loss = self._cross_entropy(hidden, labels, shift_labels, num_items_in_batch, kwargs)
        if outputs.tokens_per_expert is not None:
            aux_loss = self._aux_loss(outputs, attention_mask, hidden)
            tokens_per_expert = outputs.tokens_per_expert.detach()
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device) / aux_loss_divisor
        return MoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{cache_name.NAME: getattr(outputs, cache_name.NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            ce_loss=ce_loss,
            tokens_per_expert=tokens_per_expert,
        )

    def _cross_entropy(self, hidden, labels, shift_labels, num_items, kwargs) -> torch.Tensor:
        if self.loss_function is not ForCausalLMLoss or not isinstance(self.lm_head, LMHead):
            logits = self.lm_head(hidden)
            return self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items, shift_labels=shift_labels, **kwargs
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return self.lm_head(hidden, shift_labels.to(hidden.device), num_items)

    def _aux_loss(self, outputs: MoeModelOutput, attention_mask, hidden) -> torch.Tensor:
        batch, seqlen = hidden.shape[:2]
        token_mask = _token_mask(attention_mask, seqlen)
        tokens = batch * seqlen if token_mask is None else token_mask.sum()
        layers = len(outputs.tokens_per_expert)
        routes, probabilities = outputs.tokens_per_expert.sum(0), outputs.probability_sum.sum(0)
        sequence = self.model.sequence
        if sequence is not None:
            counted = tokens if isinstance(tokens, torch.Tensor) else routes.new_tensor(tokens)
            routes, probabilities, tokens = map(sequence.sum, (routes, probabilities, counted))
        return load_balancing_loss(routes, probabilities, tokens * layers)
