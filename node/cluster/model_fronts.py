"""What an entry node needs of a model, its tokenizer and template, brought once and kept for the next request."""

from __future__ import annotations

from collections import OrderedDict

from swarmd.discovery.records import InstanceRecord
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.models.progress import ProgressCallback
from swarmd.node.models.text_process import ModelText

MAX_FRONTS = 16


class ModelFronts:
    """The fronts of the models that were asked for last."""

    def __init__(self, exchange: ModelExchange, progress: ProgressCallback) -> None:
        self._exchange = exchange
        self._progress = progress
        self._fronts: OrderedDict[str, ModelText] = OrderedDict()

    async def of(self, record: InstanceRecord) -> ModelText:
        """The front of an instance's model. Raises ModelFileError when it cannot be had."""
        sha256 = record.model.sha256
        if sha256 not in self._fronts:
            manifest = await self._exchange.manifest(record.model)
            path = await self._exchange.header(manifest, self._progress)
            self._fronts[sha256] = await ModelText.open(path)
            while len(self._fronts) > MAX_FRONTS:
                await self._fronts.popitem(last=False)[1].close()
        self._fronts.move_to_end(sha256)
        return self._fronts[sha256]

    async def close(self) -> None:
        """End their processes."""
        for front in self._fronts.values():
            await front.close()
