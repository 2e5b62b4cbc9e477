"""Ollama's options as pumice's sampling."""

from __future__ import annotations

from collections.abc import Collection

from pumice.engine.sampling import Sampling
from pumice.options import Options

_UNLIMITED_TURNS = 10
"""Without a limit Ollama ends an answer at so many times its context."""


def sampling(options: Options, *, context: int, given: Collection[str] = ()) -> tuple[Sampling, tuple[str, ...]]:
    """How an answer is drawn, and those names among `given` (what a request or a model set) that it cannot follow.

    `context`: positions of the model, for answers without a limit. Out of their range, temperature, top_k, top_p, min_p
    and seed mean what they mean in Ollama: the nearest value in range, and a negative seed a random one. Raises
    UserError for what is out of range otherwise.

    num_keep is not followed: nothing is dropped from the middle of a prompt. Of repeat_last_n only 0 is followed, which
    turns the repetition penalty off; otherwise pumice penalises what stands anywhere in the prompt and the answer.
    """
    penalty = 1.0 if options.repeat_last_n == 0 else options.repeat_penalty
    made = Sampling(
        temperature=max(0.0, options.temperature),
        top_k=max(0, options.top_k),
        top_p=min(1.0, max(0.0, options.top_p)),
        min_p=min(1.0, max(0.0, options.min_p)),
        typical_p=min(1.0, max(0.0, options.typical_p)),
        repetition_penalty=penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=None if options.seed < 0 else options.seed,
        stop=tuple(filter(None, options.stop)),
        max_tokens=options.num_predict if options.num_predict > 0 else _UNLIMITED_TURNS * context,
    )
    deaf = {"num_keep"} | ({"repeat_last_n"} if options.repeat_last_n and penalty != 1 else set())
    return made, tuple(name for name in given if name in deaf)
