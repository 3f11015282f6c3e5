"""Writing mp_rank checkpoints tensor by tensor: the files are laid out empty, mapped, and filled in place."""

from __future__ import annotations

import argparse
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_llm.checkpoint.expert_files import ExpertLayout, slice_of_stack, stack_dims, stored_name
from mindspeed_llm.checkpoint.megatron_args import megatron_args
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER, fused_name
from mindspeed_llm.checkpoint.nf4_shards import fields_of, quantized_shards, stored_fields
from mindspeed_llm.checkpoint.quantized import NF4_RECORD
from mindspeed_llm.checkpoint.rank_files import FILE_NAME, NF4, rank_directory_name
from mindspeed_llm.checkpoint.zip_seal import update_checksums
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, tensor_names
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import LayerMap


@dataclass(frozen=True)
class MegatronLayout:
    """How a checkpoint is cut.

    Args:
        layers: pipeline stages and chunks.
        tp: tensor-parallel size.
        padded_vocab: rows of the padded vocabulary over all ranks.
        transformer_impl: "local", or "transformer_engine" for that library's spelling of the norms.
        experts: how routed experts are cut and stored.
    """

    layers: LayerMap
    tp: int
    padded_vocab: int
    transformer_impl: str = "local"
    experts: ExpertLayout = ExpertLayout()

    def to_json(self) -> dict[str, Any]:
        """A json record of the layout."""
        return {
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.layers.pp,
            "chunks": [[list(chunk) for chunk in stage] for stage in self.layers.chunks],
            "padded_vocab_size": self.padded_vocab,
            "transformer_impl": self.transformer_impl,
            "expert_parallel_size": self.experts.ep,
            "expert_tensor_parallel_size": self.experts.within(self.tp),
            "grouped_experts": self.experts.grouped,
        }


class MegatronWriter:
    """Writes one iteration, one pipeline stage at a time.

    Args:
        directory: where the files of the iteration go.
        shape: of the whole model.
        dtypes: mcore name -> type to store.
        iteration: recorded in the files.
        quantize: write the linears of the layers in NF4 (`checkpoint.nf4_shards`).

    Raises:
        UserError: the model cannot be cut or stored like that.
    """

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        layout: MegatronLayout,
        dtypes: dict[str, torch.dtype],
        iteration: int,
        quantize: bool = False,
    ) -> None:
        layouts.check_tensor_parallel(shape, layout.tp)
        self.etp = layout.experts.within(layout.tp)
        layouts.check_expert_parallel(shape, layout.experts.ep, self.etp)
        if layout.transformer_impl not in ("local", "transformer_engine"):
            raise UserError(
                f"checkpoint: transformer-impl {layout.transformer_impl!r}; legal: local, transformer_engine"
            )
        if layout.transformer_impl == "transformer_engine" and shape.multi_latent_attention:
            raise UserError(
                "checkpoint: transformer-impl transformer_engine is not implemented for multi-head latent attention; "
                "legal: local"
            )
        if quantize and layout.experts.grouped:
            raise UserError(
                "convert: --qlora-nf4 with --moe-grouped-gemm is wrong, because experts in NF4 are stored one by one; "
                "legal: either; try: leave --moe-grouped-gemm out here, and give it to the run, which stacks them"
            )
        self.directory, self.shape, self.layout = directory, shape, layout
        self.dtypes, self.iteration, self.quantize = dtypes, iteration, quantize
        self._pairs = {pair.mcore: pair for pair in tensor_pairs(shape)}
        self._ranks: dict[tuple[int, int], dict[str, Any]] = {}
        self._files = layout.experts.files(layout.tp)
        self._num_local_experts = (shape.num_moe_experts or 0) // layout.experts.ep

    def stage_names(self, pp_rank: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """(mcore name with global index, [(model key, name in the file), ...]) of a stage, in model order."""
        layers = self.layout.layers
        for pair in tensor_pairs(self.shape):
            layer = tensor_names.layer_index(pair.mcore)
            if layer is not None:
                p, v, local = layers.place(layer)
                places = [(p, v, tensor_names.with_layer(pair.mcore, local))]
            elif pair.mcore == EMBEDDING:
                places = [(0, 0, pair.mcore)]
                if self.shape.mtp_num_layers and layers.pp > 1:
                    places.append((layers.pp - 1, layers.vpp - 1, EMBEDDING))
                elif self.shape.tie_word_embeddings and layers.pp > 1:
                    places.append((layers.pp - 1, layers.vpp - 1, OUTPUT_LAYER))
            else:
                places = [(layers.pp - 1, layers.vpp - 1, pair.mcore)]
            with_experts = layer is not None and self.shape.is_moe_layer(layer)
            here = [(self._key(v), self._spelled(name, with_experts)) for p, v, name in places if p == pp_rank]
            if here:
                yield pair.mcore, here

    def open_stage(self, pp_rank: int) -> None:
        """Lay out and map the files of all tensor- and expert-parallel ranks of a stage."""
        self._ranks = {}
        for tp_rank, ep_rank in self._files:
            path = self._path(tp_rank, pp_rank, ep_rank)
            path.parent.mkdir(parents=True)
            _lay_out(path, self._content(pp_rank, ep_rank))
            self._ranks[tp_rank, ep_rank] = _map_shared(path)

    def write(self, name: str, places: list[tuple[str, str]], tensor: Tensor) -> None:
        """Fill every rank's share of one tensor of the open stage.

        Args:
            name: mcore name with the global layer index.
            places: from `stage_names`.
            tensor: unsharded and unpadded, any floating type.
        """
        owner, slot = self._expert_place(name)
        if self.in_nf4(name):
            self._write_nf4(name, places, tensor, owner)
            return
        for (tp_rank, ep_rank), content in self._ranks.items():
            if owner is None:
                piece = layouts.shard(tensor, name, self.shape, tp_rank, self.layout.tp, self.layout.padded_vocab)
            elif owner == ep_rank:
                piece = layouts.shard(tensor, name, self.shape, tp_rank % self.etp, self.etp)
            else:
                continue
            for key, stored in places:
                target = content[key][stored]
                if tensor_names.is_stacked_experts(stored):
                    target = slice_of_stack(target, self._local_shape(name), slot)
                target.copy_(piece)

    def _write_nf4(self, name: str, places: list[tuple[str, str]], tensor: Tensor, owner: int | None) -> None:
        cut = quantized_shards(tensor.to(self.dtypes[name]), self._pairs[name], self.shape)
        size = self.layout.tp if owner is None else self.etp
        for (tp_rank, ep_rank), content in self._ranks.items():
            if owner not in (None, ep_rank):
                continue
            matrix = cut(tp_rank % size, size)
            for key, stored in places:
                for field, value in fields_of(stored, matrix).items():
                    content[key][field].copy_(value)

    def in_nf4(self, name: str) -> bool:
        """Whether a tensor is written in NF4."""
        return self.quantize and is_quantized(name)

    def close_stage(self, pp_rank: int) -> None:
        """Unmap the files of a stage, correct their checksums, and wait until they are on disk."""
        self._ranks = {}
        for tp_rank, ep_rank in self._files:
            path = self._path(tp_rank, pp_rank, ep_rank)
            update_checksums(path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def num_bytes(self) -> int:
        """Size of all tensors that will be written."""
        total = 0
        for pp_rank in range(self.layout.layers.pp):
            for name, places in self.stage_names(pp_rank):
                owner = self._expert_place(name)[0]
                copies = sum(owner in (None, ep_rank) for _, ep_rank in self._files)
                for dims, dtype in self._planned(name, name).values():
                    total += torch.Size(dims).numel() * dtype.itemsize * copies * len(places)
        return total

    def _planned(self, name: str, stored: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what a rank's file holds of a tensor, one expert's by itself, under the stored name."""
        dims = self._local_shape(name)
        if self.in_nf4(name):
            return stored_fields(stored, self._pairs[name], self.shape, dims)
        return {stored: (dims, self.dtypes[name])}

    def _content(self, pp_rank: int, ep_rank: int) -> dict[str, Any]:
        content: dict[str, Any] = {self._key(v): {} for v in range(self.layout.layers.vpp)}
        with FakeTensorMode():
            for name, places in self.stage_names(pp_rank):
                if self._expert_place(name)[0] not in (None, ep_rank):
                    continue
                for key, stored in places:
                    for field, (dims, dtype) in self._planned(name, stored).items():
                        if tensor_names.is_stacked_experts(field):
                            dims = stack_dims(field, dims, self._num_local_experts)
                        if field not in content[key]:
                            content[key][field] = torch.empty(dims, dtype=dtype)
        if self.quantize:
            names = [name for name, _ in self.stage_names(pp_rank) if self.in_nf4(name)]
            content[NF4] = NF4_RECORD | {"dtypes": {name: self.dtypes[name] for name in names}}
        content.update(checkpoint_version=3.0, iteration=self.iteration, args=self._args())
        return content

    def _args(self) -> argparse.Namespace:
        layout, layers = self.layout, self.layout.layers
        dtype = self.dtypes[EMBEDDING]
        longest = max(len(chunk) for stage in layers.chunks for chunk in stage)
        uneven = layers.vpp == 1 and any(len(stage[0]) != longest for stage in layers.chunks)
        return argparse.Namespace(
            **{
                **megatron_args(self.shape),
                "num_layers": layers.num_slots,
                "vocab_size": self.shape.vocab_size,
                "padded_vocab_size": layout.padded_vocab,
                "tensor_model_parallel_size": layout.tp,
                "pipeline_model_parallel_size": layers.pp,
                "expert_model_parallel_size": layout.experts.ep,
                "expert_tensor_parallel_size": self.etp,
                "moe_grouped_gemm": layout.experts.grouped,
                "virtual_pipeline_model_parallel_size": layers.vpp if layers.vpp > 1 else None,
                "num_layers_per_virtual_pipeline_stage": longest if layers.vpp > 1 else None,
                "num_layer_list": ",".join(str(len(s[0])) for s in layers.chunks) if uneven else None,
                "noop_layers": ",".join(map(str, layers.noop_layers)) or None,
                "transformer_impl": layout.transformer_impl,
                "use_mcore_models": True,
                "params_dtype": dtype,
                "bf16": dtype == torch.bfloat16,
                "fp16": dtype == torch.float16,
                "iteration": self.iteration,
                "consumed_train_samples": 0,
                "consumed_valid_samples": 0,
            }
        )

    def _key(self, vpp_rank: int) -> str:
        return "model" if self.layout.layers.vpp == 1 else f"model{vpp_rank}"

    def _spelled(self, name: str, with_experts: bool) -> str:
        engine = self.layout.transformer_impl == "transformer_engine"
        if tensor_names.expert_index(name) is not None:
            return stored_name(name, self.shape, self.layout.experts, engine)
        # In a layer with experts the norm before them stands for itself.
        return name if not engine or (with_experts and ".pre_mlp_layernorm." in name) else fused_name(name)

    def _expert_place(self, name: str) -> tuple[int | None, int | None]:
        """(expert-parallel rank, number on that rank) of an expert's tensor; (None, None) for what all ranks hold."""
        expert = tensor_names.expert_index(name)
        return (None, None) if expert is None else divmod(expert, self._num_local_experts)

    def _local_shape(self, name: str) -> tuple[int, ...]:
        size = self.layout.tp if tensor_names.expert_index(name) is None else self.etp
        return layouts.local_shape(name, self.shape, size, self.layout.padded_vocab)

    def _path(self, tp_rank: int, pp_rank: int, ep_rank: int) -> Path:
        name = rank_directory_name(tp_rank, pp_rank, self.layout.layers.pp, ep_rank, self.layout.experts.ep)
        return self.directory / name / FILE_NAME


def _lay_out(path: Path, content: dict[str, Any]) -> None:
    """A torch file whose fake tensors take their place but hold no data yet."""
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, path)
    with path.open("rb+") as file:
        # a full disk is an error here; found out while writing through a mapping it would kill the process
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _map_shared(path: Path) -> dict[str, Any]:
    """The file's content with tensors that write through to it."""
    with (
        torch.serialization.set_default_mmap_options(mmap.MAP_SHARED),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        return torch.load(path, mmap=True, weights_only=True)
