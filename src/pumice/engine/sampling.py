"""How the next token is drawn from the scores. The order:

    the guide's mask, logit bias, repetition penalty, frequency and presence penalty,
    temperature, top-k, top-p, min-p, typical-p

It is that of Transformers' generate, which has the bias (`sequence_bias`) before the repetition penalty, as vLLM and
llama.cpp have. Frequency and presence penalties, which Transformers lacks, stand behind it as in those two.

B rows · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from pumice.engine.filters import candidates, log_probabilities, penalised, pick
from pumice.errors import UserError, shortened

MAX_STOPS = 64
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_LOGPROBS = 20
"""As OpenAI's API has it."""
AT_ONCE = 64
"""Positions whose log-probabilities are in memory: of a large vocabulary half a megabyte each."""


@dataclass(frozen=True)
class Sampling:
    """What may vary from answer to answer. The defaults are deterministic.

    temperature: 0 takes the best token; top_k: 0 is off; top_p: keep the smallest set with this much probability;
    min_p: drop tokens below this share of the best one's probability; repetition_penalty: 1 is off (Keskar et al.
    2019: scores of tokens already in the row, prompt included, are divided by it, negative ones multiplied);
    seed: same seed, same answer; stop: texts that end the answer and are not part of it; max_tokens: new tokens.

    typical_p: 1 is off (Meister et al. 2022: keep the tokens of most expected surprise with this much probability);
    presence_penalty, frequency_penalty: 0 is off (OpenAI: subtracted from the scores of generated tokens, once and once
    for each time); logit_bias: token ids and what is added to their scores, from -100 to 100, kept as pairs by rising
    id; stop_ids: tokens that end the answer and are its last; logprobs: None is off, else how many of the most likely
    tokens are told with each drawn one (`Drawn`).

    Raises UserError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    max_tokens: int = 512
    _: KW_ONLY
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    stop_ids: Sequence[int] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("max_tokens", self.max_tokens, 1, 2**31)
        _check("typical_p", self.typical_p, 0.0, 1.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        # One text, a list or a dict is what people write; a frozen value wants tuples.
        stop = _few("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, MAX_STOPS, "texts")
        if not all(isinstance(each, str) and each for each in stop):
            raise UserError("stop holds an empty text, or what is no text", hint="give a text, or a list of texts")
        stop_ids = _few("stop_ids", self.stop_ids, MAX_STOPS, "token ids")
        for token in stop_ids:
            _check("a token of stop_ids", token, 0, 2**31)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", stop_ids)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def check_vocabulary(self, tokens: int) -> None:
        """Raises UserError where a token is named that a vocabulary of so many tokens does not have."""
        for name, ids in (("logit_bias", dict(self.logit_bias)), ("stop_ids", self.stop_ids)):
            for token in ids:
                if token >= tokens:
                    raise UserError(f"{name} names token {token}", hint=f"the model has tokens 0 to {tokens - 1}")


def _check(name: str, value: float, low: float, high: float) -> None:
    whole = isinstance(low, int)
    fits = isinstance(value, int) if whole else isinstance(value, int | float)
    if not fits or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {_said(value)}", hint=f"give {kind} from {low} to {high}")


def _few(name: str, given: object, most: int, what: str) -> tuple:
    """A list as a tuple, of which no more is read than may be there."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UserError(f"{name} is {_said(given)}", hint=f"give a list of {what}")
    entries = tuple(islice(given, most + 1))
    if len(entries) > most:
        raise UserError(f"{name} has more than {most} entries", hint=f"give at most {most} {what}")
    return entries


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(islice(given.items(), MAX_BIASES + 1)) if isinstance(given, Mapping) else given
    pairs = _few("logit_bias", pairs, MAX_BIASES, "pairs of a token id and a number")
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(f"logit_bias holds {_said(pair)}", hint="give a dict of token ids and numbers")
        _check("a token of logit_bias", pair[0], 0, 2**31)
        _check(f"logit_bias of token {pair[0]}", pair[1], -MAX_BIAS, MAX_BIAS)
    if len(dict(pairs)) < len(pairs):
        raise UserError("logit_bias names a token twice", hint="give each token once")
    return tuple(sorted(pairs))


def _said(value: object) -> str:
    """A value for an error, in one line: whatever it is, not all of it is written out."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Drawn:
    """A drawn token. Where `Sampling.logprobs` asks for it: its log-probability, and the most likely tokens of its
    position with theirs, from the best down.

    They are the model's own: of the scores as they came, before guide, bias, penalties, temperature and filters. So do
    vLLM (`raw_logprobs`, its default) and llama.cpp's server (unless `post_sampling_probs`), and answers that were
    drawn in different ways can be compared.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Guide(Protocol):
    """What an answer must look like, token by token: structured output."""

    def mask(self, scores_V: Tensor) -> Tensor:
        """The scores (float32, on the CPU, to be left as they are) with -inf where a token is not allowed next."""

    def push(self, token: int) -> None:
        """This token came."""


class Sampler:
    """Draws the tokens of one row: the settings, the row's own random state, and which tokens it has seen."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], guide: Guide | None = None) -> None:
        """Ids of the prompt that are no tokens (negative, past the vocabulary) have no penalty."""
        self.sampling, self._guide = sampling, guide
        self._random = Random(None if sampling.seed is None else sampling.seed % 2**64)
        self._bias = None
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias)
            self._bias = torch.tensor(ids), torch.tensor(biases, dtype=torch.float32)
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._seen = _Seen(prompt_ids) if penalties != (1, 0, 0) else None
        unchanged = guide is None and self._bias is None and self._seen is None
        self.plain = unchanged and sampling.temperature == 0 and sampling.logprobs is None
        """The token with the best score is all that is asked for."""

    def draw(self, logits_V: Tensor) -> Drawn:
        """The next token, from scores of one position; remembers it. Raises UserError for scores that are no numbers,
        and where the guide allows no token."""
        (drawn,) = draw_all([self], logits_V[None])
        if isinstance(drawn, UserError):
            raise drawn
        return drawn

    def take(self, token: int) -> None:
        """A token that came without being drawn, as when a grammar allows no other: the row has it, the guide knows. It
        uses up the seed's number of its place, as it would if it were drawn: which of the two it is depends on what
        else runs."""
        self._random.random()
        self._remember(token)

    def _remember(self, token: int) -> None:
        if self._seen is not None:
            self._seen.add(token)
        if self._guide is not None:
            self._guide.push(token)

    def _adjusted(self, scores_V: Tensor) -> Tensor:
        """The scores after all that comes before the temperature."""
        if self._guide is not None:
            scores_V = self._guide.mask(scores_V)
            if scores_V.max() == -math.inf:
                raise UserError("the grammar of the answer allows no token here", hint="loosen it, or ask without it")
        if self._bias is not None:
            scores_V = scores_V.index_add(0, *self._bias)
        if self._seen is not None:
            scores_V = penalised(scores_V, self._seen.ids, self._seen.counts, self.sampling)
            if not scores_V.max().isfinite():
                raise no_numbers()
        return scores_V

    def _drawn(self, logits_V: Tensor, scores_V: Tensor) -> Drawn:
        if self.sampling.temperature == 0:
            token = int(scores_V.argmax())
        else:
            ids_N, chances_N = candidates(scores_V, self.sampling)
            token = int(ids_N[pick(chances_N, self._random.random())])
        self._remember(token)
        if self.sampling.logprobs is None:
            return Drawn(token)
        return Drawn(token, *log_probabilities(logits_V, token, self.sampling.logprobs))


class _Seen:
    """The tokens of a row, each once, and how often each was generated."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        ids = sorted({token for token in prompt_ids if token >= 0})
        self._places = {token: place for place, token in enumerate(ids)}
        self.ids, self.counts = torch.tensor(ids, dtype=torch.long), torch.zeros(len(ids))

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self.ids):
            self.ids = torch.cat((self.ids, torch.tensor([token])))
            self.counts = torch.cat((self.counts, torch.zeros(1)))
        self.counts[place] += 1


def draw_all(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[Drawn | UserError]:
    """The next token of every row, each as its sampler alone would draw it, or what `Sampler.draw` would raise for it:
    a row that cannot draw changes nothing for the others. Of plain rows nothing but the token and its score leaves the
    device; the scores of the others are moved together."""
    largest, best = (each_B.tolist() for each_B in logits_BV.max(-1))  # what is no number counts as the largest
    fine = [*map(math.isfinite, largest)]
    drawn: list[Drawn | UserError] = [Drawn(token) if draws else no_numbers() for token, draws in zip(best, fine)]
    others = [row for row, sampler in enumerate(samplers) if fine[row] and not sampler.plain]
    if others:
        logits_NV = (logits_BV if len(others) == len(best) else logits_BV[others]).detach().float().cpu()
        for row, logits_V in zip(others, logits_NV):
            try:
                drawn[row] = samplers[row]._drawn(logits_V, samplers[row]._adjusted(logits_V))
            except UserError as error:
                drawn[row] = error
    return drawn


def log_likelihoods(logits_KV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The model's own log-probability of one token at each of K positions, in float32."""
    found: list[float] = []
    for part_KV in torch.split(logits_KV.detach(), AT_ONCE):
        logs_KV = part_KV.float().cpu().log_softmax(-1)
        found += logs_KV[torch.arange(len(logs_KV)), list(tokens[len(found) : len(found) + len(logs_KV)])].tolist()
    return found


def no_numbers() -> UserError:
    """What to say of scores that are NaN or infinite."""
    return UserError(
        "the model's scores are not numbers",
        hint="its weights are damaged, or too large for their type: try --dtype float32",
    )
