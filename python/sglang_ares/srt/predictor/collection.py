"""What both ways of collecting share: the prompts, what is missing, and where it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sglang_ares.srt.predictor.dataset import DatasetInfo, DatasetWriter, RequestRecord
from sglang_ares.srt.predictor.identity import identify
from sglang_ares.srt.predictor.prompts import prompts


class Collection:
    """One run of ``collect``; what is complete on disk is not run again."""

    def __init__(
        self,
        folder: Path,
        *,
        model_path: str,
        source: str,
        requests: int,
        seed: int,
        max_new_tokens: int,
        temperature: float,
        at_once: int,
    ) -> None:
        self.model_path = model_path
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.at_once = at_once
        self.prompts = prompts(source, requests, seed)
        self.console = Console()
        self.writer = DatasetWriter(
            folder,
            DatasetInfo(
                model=identify(model_path),
                prompts=source,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            ),
        )
        self.missing = [i for i in range(len(self.prompts)) if i not in self.writer.done]
        self._seed = seed
        self._tokens = 0

    def sampling_seed(self, number: int) -> int:
        """From it and a token's position the token is drawn, however the request is decoded."""
        return (self._seed << 20) + number

    def record(
        self, number: int, prompt_ids: list[int], length: int, censored: bool
    ) -> RequestRecord:
        """A request that has ended; shown in the progress bar."""
        self._tokens += length
        self._progress.update(self._bar, advance=1, tokens=self._tokens)
        return RequestRecord(
            request=number,
            prompt=self.prompts[number],
            prompt_ids=prompt_ids,
            length=length,
            censored=censored,
        )

    @contextmanager
    def progress(self) -> Iterator[None]:
        """A bar over all requests."""
        with Progress(
            TextColumn("collecting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        ) as self._progress:
            total = len(self.prompts)
            self._bar = self._progress.add_task("", total=total, tokens=0)
            self._progress.update(self._bar, completed=total - len(self.missing))
            yield
