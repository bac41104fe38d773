"""Whether a model keeps packed rows apart, found out by trying where it is not known."""

import torch

from ..modeling.model_checks import PACKAGES, TESTED, evaluating, innermost


@torch.no_grad()
def check_packing(model):
    """
    Args:
        model (`PreTrainedModel`): As it will be trained, not yet distributed.

    Raises:
        `ValueError`: if rows that lie behind each other see each other, or it cannot be tried because the parameters are
            distributed already.
    """
    inner = innermost(model)
    if model.config.model_type in TESTED and type(inner).__module__.startswith(PACKAGES):
        return
    advice = "Set packing=False, which pads rows instead."
    if any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in inner.parameters()):
        raise ValueError(
            f"packing=True with {type(inner).__name__}: whether its attention keeps packed rows apart has to be tried, which "
            f"cannot be done once its parameters are distributed. {advice}"
        )
    generator = torch.Generator().manual_seed(0)
    size = min(model.config.get_text_config(decoder=True).vocab_size, 2**31 - 1)
    tokens = torch.randint(size, (1, 16), generator=generator).to(model.device)
    positions = torch.cat([torch.arange(10), torch.arange(6)])[None].to(model.device)
    with evaluating(model):
        try:
            packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 10:].float()
        except TypeError as error:
            raise ValueError(
                f"packing=True tells rows apart by position ids, which {type(inner).__name__} does not take ({error}). {advice}"
            ) from error
        plain = model(input_ids=tokens[:, 10:], use_cache=False).logits.float()
    # What the first row would do to the second is of the order of the logits themselves.
    if not torch.allclose(packed, plain, atol=float(plain.std()) / 20):
        raise ValueError(
            f"packing=True, but {type(inner).__name__} lets packed rows see each other: logits are off by "
            f"{float((packed - plain).abs().max()):.1e}. {advice}"
        )
