"""Which codebooks a catalog's codes belong to."""

import hashlib
import json


def codebook_version(quantizer):
    """
    Args:
        quantizer ([`ResidualQuantizer`] or [`RQVAE`]):
            Fitted.

    Returns:
        `str`: 16 hexadecimal digits that change with any parameter of the quantizer, and with how it encodes.
    """
    names = ("metric", "normalize_residuals", "num_beams", "skipped_codes")
    how = {name: getattr(quantizer.config, name, None) for name in names}
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for name, tensor in sorted(quantizer.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_quantizer(quantizer, codebook_sizes, version=None):
    """
    Args:
        quantizer ([`ResidualQuantizer`] or [`RQVAE`])
        codebook_sizes (`list[int]`):
            The catalog's.
        version (`str`, *optional*):
            The catalog's, if it knows one.

    Returns:
        `str`: what [`codebook_version`] gives.

    Raises:
        `ValueError`: if the quantizer is not fitted, or another than the catalog's.
    """
    if list(quantizer.codebook_sizes) != codebook_sizes or len(quantizer.codebooks) == 0:
        raise ValueError(
            f"The quantizer has codebooks {list(quantizer.codebook_sizes)}"
            + ("" if len(quantizer.codebooks) else " and is not fitted")
            + f", the catalog has {codebook_sizes}. Pass the quantizer that gave this catalog's codes."
        )
    found = codebook_version(quantizer)
    if version is not None and found != version:
        raise ValueError(
            f"The quantizer has codebook version {found}, the catalog was built with {version}: its codes would name other "
            "things. Pass the quantizer of this catalog (tokenizer.quantizer), or build a new catalog."
        )
    return found


def measures_embeddings(quantizer):
    """Whether squared errors from embeddings to sums of code vectors are what the quantizer goes by."""
    config = quantizer.config
    return getattr(config, "metric", None) == "euclidean" and not (config.normalize_residuals or config.skipped_codes)
