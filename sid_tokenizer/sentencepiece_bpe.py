"""sentencepiece BPE models as fast tokenizers that give the same ids."""

import importlib
import itertools
import math
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

SPACE = "▁"  # what sentencepiece writes for a space, U+2581
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def fast_tokenizer_from_sentencepiece(path):
    r"""
    Converts a sentencepiece BPE model to a fast tokenizer with the same ids.

    `encode(text).ids` and `decode(ids)` are those of `sentencepiece.SentencePieceProcessor`, except that

    - control symbols and the unknown symbol written in a text (`"</s>"`) become these tokens, which sentencepiece would spell
      out. `tokenizer.encode_special_tokens = True`, which is `split_special_tokens=True` in transformers, spells them out, too;
    - in a model with `add_dummy_prefix`, a text that is nothing but one user-defined symbol gets no space in front;
    - `decode` leaves the unknown symbol out, or writes its name with `skip_special_tokens=False`, where sentencepiece writes
      `" ⁇ "`; a run of byte tokens that is not UTF-8 becomes one `"\ufffd"` for each of its bytes, also where a part of the run
      would be; and in a model with `remove_extra_whitespaces` it takes one space from the beginning, where sentencepiece may take
      several if the text began with the character `"▁"`.

    Merges are ordered by the score of the piece that they make, as sentencepiece does, and not by its id. Whatever tokenizers
    cannot express is refused, and before a tokenizer is returned, it has encoded and decoded all pieces and compared with
    sentencepiece.

    Args:
        path (`str` or `os.PathLike`):
            The model, usually called `tokenizer.model`.

    Returns:
        `tokenizers.Tokenizer`: without post-processor. User-defined symbols are added tokens, control symbols and the unknown
        symbol special added tokens.

    Raises:
        `ImportError`: if sentencepiece or protobuf is not installed.
        `ValueError`: if the file is no sentencepiece model, no BPE model, or one that tokenizers cannot reproduce: with a
            normalization or denormalization rule, whitespace as suffix or not escaped, scores that tie, unused pieces that would be
            merged, or pieces of characters that are no pieces.

    Example:

    ```python
    tokenizer = fast_tokenizer_from_sentencepiece("Baichuan2-7B-Base/tokenizer.model")
    tokenizer.encode("potato chips").ids
    ```
    """
    proto, processor = _read_model(path)
    _check_settings(proto, path)
    spec, byte_fallback = proto.normalizer_spec, proto.trainer_spec.byte_fallback
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: token_id for token_id, piece in enumerate(proto.pieces)},
            merges=_ordered_merges(proto, path),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )

    # A symbol with a space never occurs in normalized text, where spaces are escaped: sentencepiece does not find it, either.
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and " " not in piece.piece]
    steps = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and symbols:
        # tokenizers looks for a symbol as the normalizer writes it, so the normalizer must leave symbols as they are.
        either = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{either})\z)(?m:(?=.))"), SPACE))
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    changed = [symbol for symbol in symbols if tokenizer.normalizer.normalize_str(symbol) != symbol]
    if changed:
        raise ValueError(
            f"{path}: the model removes extra whitespace, also from its user-defined symbol {changed[0]!r}, which tokenizers "
            "would then look for in another form. Train it with remove_extra_whitespaces=False, or without that symbol."
        )
    # Symbols are looked for in normalized text, as sentencepiece does: one of spaces only is found in no other.
    tokenizer.add_tokens([AddedToken(symbol, normalized=True) for symbol in symbols])
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(symbol, normalized=False, special=True) for symbol in special])

    decoding = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        decoding.append(decoders.ByteFallback())
    decoding.append(decoders.Fuse())
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        decoding.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(decoding)
    _check_against_sentencepiece(tokenizer, processor, proto, path)
    return tokenizer


def _read_model(path):
    """The model as protobuf message, and as processor, which loads what is valid only."""
    try:
        sentencepiece = importlib.import_module("sentencepiece")
        protobuf = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        decode_error = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise ImportError(
            f"Reading a sentencepiece model needs sentencepiece and protobuf ({error}): pip install rqsid[sentencepiece]. A saved "
            "tokenizer.json needs neither."
        ) from None
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the model itself. Fetch it with git lfs pull.")
    proto = protobuf.ModelProto()
    try:
        proto.ParseFromString(content)
        if not proto.pieces:
            raise ValueError("it holds no pieces")
        return proto, sentencepiece.SentencePieceProcessor(model_proto=content)
    except (decode_error, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a valid sentencepiece model ({error}): it is empty, truncated, or something else. Download it again."
        ) from None


def _check_settings(proto, path):
    """Refuses settings that tokenizers cannot express."""
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != 2:
        kind = MODEL_TYPES.get(trainer.model_type, f"type {trainer.model_type}")
        raise ValueError(
            f"{path} is a {kind} model; only BPE models are converted here. For Unigram models use AutoTokenizer or a converter of "
            "transformers.convert_slow_tokenizer, for others sentencepiece itself."
        )
    if spec.precompiled_charsmap:
        # Precompiled takes a grapheme for a character: "①" with an accent becomes "1", and the accent is gone.
        raise ValueError(
            f"{path} normalizes text by the rule {spec.name or 'of its own'!r}, which tokenizers applies to whole graphemes and so "
            "gives other text than sentencepiece. Train the model with normalization_rule_name='identity', or use sentencepiece "
            "itself."
        )
    if proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"{path} has a denormalization rule ({proto.denormalizer_spec.name!r}), which tokenizers cannot apply when it decodes. "
            "Train the model without denormalization_rule_tsv, or use sentencepiece itself."
        )
    if trainer.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path} was trained with treat_whitespace_as_suffix=True, which is not converted. Train it with False, or use "
            "sentencepiece itself."
        )
    if not spec.escape_whitespaces:
        raise ValueError(
            f"{path} has escape_whitespaces=False, which is not converted. Train it with True, or use sentencepiece itself."
        )


def _ordered_merges(proto, path):
    """
    All pairs that sentencepiece would merge, in its order: it merges two neighbours whenever they make a piece together,
    the highest score first, whatever pair the piece was made of in training. Which pair of one piece comes first makes no
    difference; the longest left part does.
    """
    types = {piece.piece: piece.type for piece in proto.pieces}
    merges = []
    for piece in proto.pieces:
        if piece.type not in (NORMAL, UNUSED):
            # sentencepiece takes user-defined symbols out of the text before it merges, and merges into no other kind.
            continue
        whole = piece.piece
        for at in range(1, len(whole)):
            parts = whole[:at], whole[at:]
            # Before anything is merged, every character stands alone, also one that is no piece. User-defined symbols never merge.
            if not all(
                types.get(part) in (NORMAL, UNUSED) or (len(part) == 1 and types.get(part) != USER_DEFINED)
                for part in parts
            ):
                continue
            strange = [part for part in parts if part not in types]
            if strange:
                raise ValueError(
                    f"{path}: the piece {whole!r} is made of the character {strange[0]!r}, which is no piece itself; tokenizers "
                    "merges nothing but pieces. Add the character to the model, or remove the piece."
                )
            if piece.type == UNUSED:
                raise ValueError(
                    f"{path}: the unused piece {whole!r} would be merged and taken apart again by sentencepiece, which tokenizers "
                    "cannot. Make it a normal piece, or remove it."
                )
            if not math.isfinite(piece.score):
                raise ValueError(
                    f"{path}: the piece {whole!r} has the score {piece.score}, which gives no order. Repair the model."
                )
            merges.append((-piece.score, -at, parts))
    merges.sort()
    for (score, _, parts), (next_score, _, next_parts) in itertools.pairwise(merges):
        if score == next_score and "".join(parts) != "".join(next_parts):
            raise ValueError(
                f"{path}: the pieces {''.join(parts)!r} and {''.join(next_parts)!r} have the same score {-score:g}. Of such, "
                "sentencepiece merges the leftmost in the text first, which tokenizers cannot. Give every piece a score of its "
                "own, as training does."
            )
    return [parts for _, _, parts in merges]


def _check_against_sentencepiece(tokenizer, processor, proto, path):
    """Encodes and decodes every piece, alone and among its neighbours, with both."""
    special = re.compile(
        "|".join(re.escape(piece.piece) for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL))
    )
    words = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type in (NORMAL, UNUSED)]
    texts = words + ["".join(words[at : at + 16]) for at in range(0, len(words), 8)]
    texts += [f"a{piece.piece} b{piece.piece}" for piece in proto.pieces if piece.type == USER_DEFINED]
    texts = [text for text in texts if not special.search(text)]
    expected = processor.encode(texts)
    found = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    known = [at for at, ids in enumerate(expected) if processor.unk_id() not in ids]
    text_of = dict(zip(known, processor.decode([expected[at] for at in known]), strict=True)) if known else {}
    decoded = dict(zip(known, tokenizer.decode_batch([expected[at] for at in known]), strict=True))
    for at, text in enumerate(texts):
        if found[at] != expected[at] or decoded.get(at) != text_of.get(at):
            raise ValueError(
                f"{path} has something that tokenizers cannot reproduce: {text!r} has the ids {expected[at]} and the text "
                f"{text_of.get(at)!r} in sentencepiece, {found[at]} and {decoded.get(at)!r} in tokenizers. Use sentencepiece itself."
            )
