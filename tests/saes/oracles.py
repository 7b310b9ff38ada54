"""The losses written out with dense latents and plain autograd: slow, obvious, and what ours must equal."""

import torch


def dense_loss(sae, x, y=None, dead=None, ramp=1.0):
    """Total loss of one SAE (not a stack), with gradients to its parameters."""
    config = sae.config
    x = x * sae.scale
    y = x if y is None else y * sae.scale_out
    if config.architecture in PENALISED:
        return PENALISED[config.architecture](sae, x, y, ramp)
    centred = x - sae.b_dec if config.architecture in ("topk", "batch_topk", "matryoshka") else x
    pre = centred @ sae.W_enc.T + sae.b_enc
    latents = pre.relu() * chosen(sae, pre)
    widths = config.widths(sae.d_in) if config.architecture == "matryoshka" else (sae.width,)
    total = 0.0
    for width in widths:
        made = latents[:, :width] @ sae.W_dec[:width] + sae.b_dec
        if config.skip:
            made = made + x @ sae.W_skip.T
        total = total + (y - made).square().sum(1).mean() / sae.variance / len(widths)
    if dead is not None and dead.any() and config.aux:
        total = total + config.aux * dense_aux(sae, pre, y - made, dead)
    return total


def chosen(sae, pre):
    """Booleans: the latents that count."""
    k = sae.config.k
    if sae.config.architecture in ("topk", "transcoder"):
        least = pre.topk(k, dim=1).values[:, -1:]
        return pre >= least
    ranked = pre.relu()
    if sae.config.architecture == "crosscoder":
        parts = sae.W_dec.detach().unflatten(1, (len(sae.config.sites), -1))
        ranked = ranked * parts.norm(dim=-1).sum(1)
    least = ranked.flatten().topk(min(k * len(pre), ranked.numel())).values[-1]
    return (ranked >= least) & (ranked > 0)


def dense_aux(sae, pre, residual, dead):
    """AuxK as Gao et al. define it."""
    config, target = sae.config, residual.detach()
    masked = torch.where(dead, pre, torch.full_like(pre, -torch.inf))
    k = min(config.aux_latents(sae.d_in), int(dead.sum()))
    values, indices = masked.topk(k, dim=1)
    values = values.relu() if config.aux_variant == "relu" else raised(values)
    acts = torch.zeros_like(pre).scatter(1, indices, values)
    error = (target - acts @ sae.W_dec).square().mean()
    return error / (target - target.mean(0)).square().mean()


def raised(values):
    """ReLU whose gradient also passes below zero where it is negative, by the surrogate max(v, 0) + s."""
    below = values < 0
    through = torch.where(below, values - values.detach(), 0.0)
    if through.requires_grad:
        through.register_hook(lambda grad: grad.clamp_max(0.0))
    return values.relu() + through


def dense_relu(sae, x, y, ramp):
    latents = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    error = (y - latents @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    return error + ramp * sae.config.penalty * (latents * sae.W_dec.norm(dim=1)).sum(1).mean()


def dense_gated(sae, x, y, ramp):
    centred = x - sae.b_dec
    gate = centred @ sae.W_enc.T + sae.b_gate
    magnitude = centred @ (sae.r_mag.exp()[:, None] * sae.W_enc).T + sae.b_mag
    latents = (gate > 0) * magnitude.relu()
    error = (y - latents @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    frozen = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    through_gate = (y - frozen).square().sum(1).mean()
    return error + ramp * sae.config.penalty * gate.relu().sum(1).mean() + through_gate


def dense_jumprelu(sae, x, y, ramp):
    pre = x @ sae.W_enc.T + sae.b_enc
    active = pre > sae.log_threshold.exp()
    made = (pre * active) @ sae.W_dec + sae.b_dec
    if sae.config.skip:
        made = made + x @ sae.W_skip.T
    error = (y - made).square().sum(1).mean()
    return error + ramp * sae.config.penalty * active.sum(1).to(x.dtype).mean()


PENALISED = {
    "relu": dense_relu,
    "gated": dense_gated,
    "jumprelu": dense_jumprelu,
    "jumprelu_transcoder": dense_jumprelu,
}


def gradients(sae, loss):
    """Gradient of every parameter, zeros where there is none."""
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(sae.named_parameters(), found)
    }
