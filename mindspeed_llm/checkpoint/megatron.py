"""Reading Megatron checkpoints of mp_rank files, ours or foreign, through the one view of all formats."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.megatron_args import ARGS_THAT_CHANGE_OUTPUTS, megatron_args
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER
from mindspeed_llm.checkpoint.nf4_shards import unshard
from mindspeed_llm.checkpoint.rank_files import EMBEDDING_AGAIN, NF4, RankFiles
from mindspeed_llm.checkpoint.source import TIED, TensorSource, check_dims, check_equal, check_names, check_one_dtype
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.mapping import TensorPair
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix


class MegatronSource(TensorSource):
    """The mcore tensors of an iteration of mp_rank files.

    Args:
        directory: the iter_XXXXXXX (or release) directory.
        shape: of the model, from our record or from an HF config.

    Raises:
        UserError: tensors are missing, unexpected, of a wrong shape; tied copies differ; recorded arguments contradict
            the shape.
    """

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        super().__init__(shape, str(directory))
        self.files = RankFiles(Path(directory), shape.num_moe_experts)
        self._in_nf4 = self.files.dtypes_in_nf4()
        self._check_args()
        self._check_tensors()

    def dtype(self, name: str) -> torch.dtype:
        return self._in_nf4.get(name) or self.files.tensors(name)[0].dtype

    @property
    def any_nf4(self) -> bool:
        return bool(self._in_nf4)

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        pair = self.pairs[name]
        if name in self._in_nf4:
            # Columns of a dense tensor may be asked for inside a block.
            columns = (0, pair.dims[1]) if pair.layout.tp_dim == 1 else (start, stop)
            dense = self.read_nf4(name, part, *columns).dense(self.dtype(name))
            return dense[:, start:stop] if pair.layout.tp_dim == 1 else dense
        tensors = self._shards(name)
        if pair.layout.tp_dim is None:
            self._check_copies(name, tensors)
            return tensors[0][start:stop]
        return self._gather(pair, tensors, part, start, stop)

    def read_nf4(self, name: str, part: int, start: int, stop: int, device: torch.device | None = None) -> Nf4Matrix:
        if name not in self._in_nf4:
            return super().read_nf4(name, part, start, stop, device)
        pair, shards = self.pairs[name], self._shards(name)
        if pair.layout.tp_dim is None:
            self._check_copies(name, [one.codes for one in shards])
            self._check_copies(name, [one.block_scales() for one in shards])
            shards = shards[:1]
        return unshard(shards, pair, self.shape, part, start, stop)

    def _check_copies(self, name: str, tensors: list[Tensor]) -> None:
        for rank, other in enumerate(tensors[1:], start=1):
            if not torch.equal(tensors[0], other):
                raise UserError(
                    f"checkpoint: {name} in {self.origin} differs between tensor-parallel ranks 0 and {rank}, "
                    f"although every rank holds a full copy; the run that wrote it diverged"
                )

    def _shards(self, name: str) -> list[Tensor | Nf4Matrix]:
        """The tensor-parallel slices of a tensor, in rank order: of an expert one of each copy.

        Raises:
            UserError: an expert is cut into more slices than files hold.
        """
        tensors, layout = self.files.tensors(name), self.pairs[name].layout
        if not layout.expert:
            return tensors
        size = self.dims(name)[layout.tp_dim] // tensors[0].shape[layout.tp_dim]
        by_rank = {rank % size: tensor for rank, tensor in zip(self.files.holders(name), tensors)}
        if sorted(by_rank) != list(range(size)):
            raise UserError(
                f"checkpoint: {name} in {self.origin} is cut into {size} slices, of which the files hold "
                f"{sorted(by_rank)}; it is incomplete; try: copy the missing mp_rank directories"
            )
        return [by_rank[rank] for rank in range(size)]

    def _gather(self, pair: TensorPair, tensors: list[Tensor], part: int, start: int, stop: int) -> Tensor:
        dim, tp = pair.layout.tp_dim, len(tensors)
        pieces, offset = [], 0
        for tensor in tensors:
            local = packing.unpack(tensor, pair.layout.packing, self.shape, tp)[part]
            size = local.shape[dim]
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                pieces.append(local.narrow(dim, first, last - first))
            offset += size
        if not pieces:  # a rank that holds padding of the vocabulary alone
            return tensors[0][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _check_args(self) -> None:
        recorded, ours = self.files.args(), megatron_args(self.shape)
        for name in ARGS_THAT_CHANGE_OUTPUTS:
            if recorded.get(name) is not None and name in ours and recorded[name] != ours[name]:
                raise UserError(
                    f"checkpoint: {self.origin} was written with {name}={recorded[name]}, but the model's config says "
                    f"{ours[name]}; try: the config.json that belongs to it"
                )

    def _check_tensors(self) -> None:
        found = list(self.files.places)
        # The last stage has a copy of the embedding for a tied output layer or for multi-token prediction.
        why = {
            OUTPUT_LAYER: TIED if self.shape.tie_word_embeddings else None,
            EMBEDDING_AGAIN: "multi-token prediction shares them" if self.shape.mtp_num_layers else None,
        }
        for again in [name for name in why if why[name] and name in self.files.places]:
            found.remove(again)
            for embedding, copy in zip(self.files.tensors(EMBEDDING), self.files.tensors(again)):
                check_dims(again, embedding.shape, copy.shape, self.origin)
                check_equal(embedding, copy, f"the embeddings of the first and last stage in {self.origin}", why[again])
        check_names(list(self.pairs), found, self.origin)
        for name, pair in self.pairs.items():
            tensors = self._shards(name)
            if any(isinstance(tensor, Nf4Matrix) != (name in self._in_nf4) for tensor in tensors):
                raise UserError(
                    f"checkpoint: {name} in {self.origin} is {'not ' * (name in self._in_nf4)}in NF4, and the files' "
                    f"record of what was quantised ({NF4!r} beside the model) says otherwise; legal: files as "
                    "convert_ckpt.py --qlora-nf4 writes them; try: convert them again"
                )
            if name not in self._in_nf4:
                check_one_dtype(name, [tensor.dtype for tensor in tensors], self.origin)
            size = len(tensors)
            for tensor in tensors:
                padded = tensor.shape[0] * size if pair.layout.packing == "vocab" else None
                check_dims(name, layouts.local_shape(name, self.shape, size, padded), tensor.shape, self.origin)
                if padded is not None:
                    layouts.vocab_range(self.shape.vocab_size, padded, 0, self.files.tp)
