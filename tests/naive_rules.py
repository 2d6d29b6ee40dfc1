"""Rules and targets as a naive loop over tokens and chunks, in float64, and the library on the same tensors."""

import torch

from inplace_ttt.core import ChunkTable, make_rule, make_target, read

D, F, C, K = 5, 7, 4, 3
LR, DECAY = 0.3, 0.1
EXACT = {"atol": 1e-9, "rtol": 1e-9}
RULE_CASES = {
    "plain": ("sum", {}),
    "decay": ("sum", {"decay": DECAY}),
    "clip": ("sum", {"decay": DECAY, "clip": 1.5}),
    "clip_relative": ("sum", {"clip": 0.4, "clip_relative": True}),
    "update_size": ("sum", {"decay": DECAY, "update_size": 0.2}),
    "soft_cap": ("sum", {"decay": DECAY, "soft_cap": 0.3}),
    "delta": ("delta", {"decay": DECAY}),
    "momentum": ("momentum", {"decay": DECAY, "beta": 0.7}),
    "muon": ("muon", {"decay": DECAY}),
    "norm_preserving": ("norm_preserving", {"decay": DECAY}),
    "adaptive": (
        "adaptive",
        {"decay": DECAY, "decrease": 0.01, "largest": 0.02, "tolerance": 0.0, "slope": 0.5, "width": 2.0},
    ),
}
TARGET_CASES = {
    f"{name} {extra or 'plain'}": (name, {} if not extra else {extra: 0.3 if extra == "ridge" else True})
    for name in ("learned", "next_token", "reconstruction", "next_error")
    for extra in ("", "gates", "ridge", "center")
}
LAYOUTS = ("whole", "packed", "left", "left and packed")


# -- the naive loop: one row, one token, one chunk after another --------------


def naive_write(name, options, W0, z, v):
    """dW [D, F] of one chunk of a rule whose write does not look at the state."""
    dW = sum(torch.outer(v[t], z[t]) for t in range(C))
    size, slow = dW.square().sum().sqrt(), W0.detach().square().sum().sqrt()
    if name == "muon":
        X = dW / (size + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        return X
    if "clip" in options:
        tau = options["clip"] * (slow if options.get("clip_relative") else 1.0)
        return dW * (tau / size) if size > tau else dW
    if "update_size" in options:
        return options["update_size"] * slow * dW / size
    if "soft_cap" in options:
        fixed = dW.detach()
        x = z.detach().sum(0) + 1e-3 * z.detach()[0]
        for _ in range(5):
            x = fixed.T @ (fixed @ (x / x.norm()))
        tau = options["soft_cap"] * slow
        return dW * tau / ((dW @ (x / x.norm())).norm() + tau)
    return dW


def naive_update(name, options, state, W0, z, v):
    keep, S = 1 - options.get("decay", 0.0), state["S"]
    if name == "delta":
        error = torch.stack([v[t] - LR * (S @ z[t]) for t in range(C)])
        return {"S": keep * S + error.T @ z / C}
    if name == "momentum":
        M = options["beta"] * state["M"] + v.T @ z
        return {"S": keep * S + M, "M": M}
    if name == "norm_preserving":
        T = keep * state["T"] + v.T @ z
        grown = W0 + LR * T
        W = torch.stack([W0[r].norm() / grown[r].norm() * grown[r] for r in range(D)])
        return {"S": (W - W0) / LR, "T": T}
    if name == "adaptive":
        return naive_adaptive(options, state, W0.detach(), z, v)
    return {"S": keep * S + naive_write(name, options, W0, z, v)}


def naive_adaptive(options, state, W0, z, v):
    S, r, dW = state["S"], state["size"], sum(torch.outer(v[t], z[t]) for t in range(C))
    g = sum(v[t] @ (LR * S @ z[t]) for t in range(C)) / C
    mean = dW.norm() if r == 0 else 0.95 * state["norm"] + 0.05 * dW.norm()
    n = torch.maximum(mean, dW.norm())
    if r == 0:
        size = options["decrease"] / (LR * W0.norm() * n / C)
    else:
        d = LR * r * W0.norm() * n / C
        size = r * torch.exp(0.1 * torch.clip((g / d - 0.0075) / options["width"], -2, 1))
    size = torch.minimum(size, torch.tensor(options["largest"], dtype=z.dtype))
    m = 0.75 * state["gain"] + 0.25 * g
    keep = (1 - options["decay"]) / (1 + torch.relu(-m - options["tolerance"]) / options["slope"])
    return {"S": keep * S + size * W0.norm() * dW / n, "size": size, "gain": m, "norm": mean}


def naive_target(target, u, z):
    """v [C, D] and the gates beta, gamma [C] of one complete chunk."""
    rows = []
    for t in range(C):
        if target.name == "next_error":
            if t + 1 == C:
                rows.append(torch.zeros_like(target.proj.weight[0]))
            else:
                width = u.shape[-1] // 2
                rows.append(u[t + 1, :width] @ target.proj.weight + u[t, width:] @ target.input_proj.weight)
            continue
        c = torch.zeros_like(u[0])
        if target.name == "learned":
            for k in range(K):
                source = t + k - (K - 1 - target.lookahead)
                if 0 <= source < C:
                    c = c + target.conv.weight[:, 0, k] * u[source]
        elif t + target.shift < C:
            c = u[t + target.shift]
        rows.append(c @ target.proj.weight)
    v = torch.stack(rows)
    if target.center:
        v = v - sum(v) / C
    if target.ridge is not None:
        gram = z @ z.T
        v = torch.linalg.solve(gram + target.ridge * gram.diagonal().mean() * torch.eye(C, dtype=z.dtype), v)
    if not target.gates:
        return v, None, None
    write, forget = (u @ target.gate.weight.T + target.gate.bias).T
    return v, 2 / (1 + torch.exp(-write)), torch.exp(-torch.log1p(torch.exp(forget)))


def naive(name, options, target, z, u, W0, documents=None):
    """Outputs [B, T, D] and each row's state after the last token: the specification, nothing batched."""
    out, after = torch.zeros(*z.shape[:2], D, dtype=z.dtype), []
    for b in range(z.shape[0]):
        zero = torch.zeros(D, F, dtype=z.dtype)
        more = {
            "momentum": {"M": zero},
            "norm_preserving": {"T": zero},
            "adaptive": dict.fromkeys(("size", "gain", "norm"), zero[0, 0]),
        }
        start = {"S": zero, **more.get(name, {})}
        state, pending, document, rows = start, [], None, []
        for t in range(z.shape[1]):
            number = 0 if documents is None else int(documents[b, t])
            if number < 0:
                rows.append(W0 @ z[b, t])
                continue
            if document is not None and number != document:
                state, pending = start, []
            document = number
            rows.append((W0 + LR * state["S"]) @ z[b, t])
            pending.append(t)
            if len(pending) == C:
                zc, uc = z[b, pending], u[b, pending]
                v, beta, gamma = naive_target(target, uc, zc)
                if gamma is not None and name == "sum" and set(options) <= {"decay"}:  # token by token
                    S = (1 - options.get("decay", 0.0)) * state["S"]
                    for s in range(C):
                        S = gamma[s] * S + beta[s] * torch.outer(v[s], zc[s])
                    state = {"S": S}
                else:
                    if gamma is not None:
                        v = torch.stack([beta[s] * gamma[s + 1 :].prod() * v[s] for s in range(C)])
                        state = {key: gamma.prod() * x for key, x in state.items()}
                    state = naive_update(name, options, state, W0, zc, v)
                pending = []
        out[b] = torch.stack(rows)
        after.append(state)
    return out, {key: torch.stack([state[key] for state in after]) for key in after[0]}


# -- the library on the same tensors -----------------------------------------------------------------------------------


def inputs(B, T, source=D):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return make(B, T, F), make(B, T, source), make(D, F)


def the_target(name="learned", options=None):
    target = make_target(name, D, options or {}, {"conv_kernel": K, "lookahead": 1}).double()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return target


def the_rule(case):
    name, options = RULE_CASES[case]
    return make_rule(name, options, {"lr": LR})


def the_documents(layout, B, T):
    if layout == "whole":
        return None
    documents = torch.zeros(B, T, dtype=torch.int64)
    if "packed" in layout:
        for b in range(B):
            documents[b] = torch.arange(T) // (C + 3 + 4 * b)
    if "left" in layout:
        for b in range(B):
            documents[b, : 2 * b + 1] = -1
    return documents


def run(rule, target, z, u, W0, documents=None, state=None):
    """One call of a layer: its output and, with a state, nothing else, for the state is brought up to date."""
    seen = None if state is None else state.seen
    keep, zero = state is not None, rule.from_zero
    table = ChunkTable.build(*z.shape[:2], C, documents=documents, seen=seen, keep_state=keep, from_zero=zero)
    out = read(z, u, table, rule=rule, target=target, width=D, state=state, weight=W0, slow=W0)
    return torch.nn.functional.linear(z, W0) if out is None else out


def compare(got, want, tensors):
    """Values, and the gradients of every tensor, of two lists of results."""
    weights = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), tensors, allow_unused=True, retain_graph=True
        )
        for xs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) if b is None else a is not None
        if b is not None:
            torch.testing.assert_close(a, b, **EXACT)
    return grads[1]
