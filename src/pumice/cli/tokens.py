"""`--logit-bias` and `--logprobs`: tokens as people write them, and as they are shown."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pumice.errors import UserError, shortened

if TYPE_CHECKING:
    from pumice.answer import Likely
    from pumice.engine import Sampling
    from pumice.model import Model
    from pumice.tokenizer import Tokenizer


def read_biases(given: Sequence[str]) -> list[tuple[str, float]]:
    """Each ID=VALUE or TEXT=VALUE as its two halves; the value stands behind the last `=`. Raises UserError for what is
    neither."""
    from pumice.engine.sampling import MAX_BIAS

    pairs = []
    for each in given:
        token, _, value = each.rpartition("=")
        try:
            token.encode()
            bias = float(value)
        except ValueError:  # half of a character, or no number
            bias = None
        if not token or bias is None:
            raise UserError(
                f"--logit-bias is {shortened(each)}", hint="give a token and a number: 822=-100, or ' red=5'"
            )
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise UserError(f"--logit-bias is {shortened(each)}", hint=f"give a number from -{MAX_BIAS} to {MAX_BIAS}")
        pairs.append((token, bias))
    return pairs


def biased(sampling: Sampling, biases: Sequence[tuple[str, float]], model: Model) -> Sampling:
    """With these biases. Raises UserError for a text that is not one token, and an id that the model does not have."""
    pairs = tuple((_id_of(token, model.tokenizer), bias) for token, bias in biases)
    sampling = dataclasses.replace(sampling, logit_bias=pairs)
    sampling.check_vocabulary(model.config.text.vocab)
    return sampling


def _id_of(token: str, tokenizer: Tokenizer) -> int:
    """Of a number itself; of the text that a token adds to an answer; of a token as the vocabulary writes it."""
    if re.fullmatch(r"[0-9]{1,10}", token):
        return int(token)
    ids = tokenizer.continued(token)
    if len(ids) == 1 and tokenizer.bytes_of(ids[0]) == token.encode():
        return ids[0]
    stored = tokenizer.id_of(token)
    if stored is None:
        spelt = ", ".join(f"{tokenizer.token_of(id)!r} {id}" for id in ids[:8])
        raise UserError(
            f"--logit-bias names the text {shortened(token)}, which is not one token of this model: {spelt}",
            hint="name one as --logprobs shows it, with the space in front of a word, or give its id",
        )
    return stored


def print_likely(logprobs: Sequence[Likely], tokenizer: Tokenizer) -> None:
    """A table on stderr, if there are any: of each token its id, its log-probability, and the most likely tokens of its
    place with theirs."""
    if not logprobs:
        return
    shown = [_shown(each, tokenizer) for each in logprobs]
    width = max(map(len, [*shown, "token"]))
    heading = "most likely" if any(each.top for each in logprobs) else ""
    print(f"{'id':>7}  {'logprob':>10}  {'token':{width}}  {heading}".rstrip(), file=sys.stderr)
    for text, each in zip(shown, logprobs):
        top = ", ".join(f"{_shown(other, tokenizer)} {other.logprob:.4f}" for other in each.top)
        print(f"{each.id:>7}  {each.logprob:10.4f}  {text:{width}}  {top}".rstrip(), file=sys.stderr)


def _shown(likely: Likely, tokenizer: Tokenizer) -> str:
    """The text that it adds, quoted; of what adds none, or a part of a character, the token in the vocabulary."""
    whole = likely.bytes == tuple(likely.token.encode())
    return repr(likely.token if likely.token and whole else tokenizer.token_of(likely.id))


def described(likely: Likely) -> dict[str, object]:
    """As plain values, by OpenAI's names."""
    own = {"id": likely.id, "token": likely.token, "bytes": list(likely.bytes), "logprob": likely.logprob}
    return own | ({"top_logprobs": [described(each) for each in likely.top]} if likely.top else {})
