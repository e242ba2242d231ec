"""`Batcher`: the images of many requests as batches of one network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from repnet.predict import Prediction, Predictor


@dataclass(frozen=True)
class _Job:
    image: np.ndarray
    name: str
    top: int
    answer: asyncio.Future[Prediction]


class Batcher:
    """Runs whatever waits as one batch, as soon as the network is free.

    No image waits for others to come: under load, a batch gathers while the one before it runs.

    Args:
        predictor: that runs them, one batch at a time, as one run uses all cores.
        largest: number of images of a batch.
        observe: called with the number of images of each batch.
    """

    def __init__(self, predictor: Predictor, largest: int, observe: Callable[[int], None]) -> None:
        self.predictor, self.largest, self.observe = predictor, largest, observe
        self.jobs: asyncio.Queue[_Job] = asyncio.Queue()

    async def classify(self, image: np.ndarray, name: str, top: int) -> Prediction:
        """Return the prediction of an image that `Predictor.prepare` returned.

        Raises:
            InputError: the model cannot classify it.
        """
        answer = asyncio.get_running_loop().create_future()
        self.jobs.put_nowait(_Job(image, name, top, answer))
        return await answer

    async def run(self) -> None:
        """Answer for as long as the server lives."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while True:
                waiting = [await self.jobs.get()]
                while len(waiting) < self.largest and not self.jobs.empty():
                    waiting.append(self.jobs.get_nowait())
                # A request that timed out or whose client has gone has cancelled its answer.
                if jobs := [job for job in waiting if not job.answer.done()]:
                    self.observe(len(jobs))
                    outcomes = await loop.run_in_executor(thread, self._outcomes, jobs)
                    for job, outcome in zip(jobs, outcomes, strict=True):
                        if job.answer.done():
                            continue
                        if isinstance(outcome, Prediction):
                            job.answer.set_result(outcome)
                        else:
                            job.answer.set_exception(outcome)

    def _outcomes(self, jobs: Sequence[_Job]) -> list[Prediction | Exception]:
        """Return the prediction of each, or why there is none; one does not spoil the others."""
        images, names = [job.image for job in jobs], [job.name for job in jobs]
        try:
            found = self.predictor.classify(images, names, top=max(job.top for job in jobs))
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self._outcomes([job])]
        pairs = zip(jobs, found, strict=True)
        return [Prediction(one.image, one.scores[: job.top]) for job, one in pairs]
