"""Theorem 1: in the induction setting the next-token target raises the right logit, the reconstruction target does not.

Setting: a sequence holds the pair (k*, v*) once; later k* comes again. Embeddings are nearly orthogonal; the
projection's input z correlates with itself at the two occurrences of k* (c_align) and with no other position. The logit
of token w after the update changes by ``e_w . lr * S z``.
"""

import torch
from method import scan, target

from inplace_ttt.core import ChunkTable

VOCABULARY, D, F, LENGTH, LR = 40, 512, 256, 24, 0.5


def embeddings():
    e = torch.randn(VOCABULARY, D, dtype=torch.float64)
    e = e / e.norm(dim=1, keepdim=True)
    gram = e @ e.T
    eps = float((gram - torch.diag(gram.diagonal())).abs().max())
    return e, eps, float(gram.diagonal().min())


def logit_changes(shift):
    """Change of every logit at the second k*, the bounds, and v*: the update comes from the library's own scan."""
    torch.manual_seed(3)
    e, eps, c_norm2 = embeddings()
    tokens = torch.randperm(VOCABULARY)[:LENGTH]
    at = 9
    k_star, v_star = tokens[at], tokens[at + 1]
    # One orthogonal direction per position: other positions contribute nothing; the query has the key's direction.
    z = torch.linalg.qr(torch.randn(F, F, dtype=torch.float64)).Q[:LENGTH]
    query = 0.8 * z[at]
    c_align = float(query @ z[at])
    chunk = torch.cat([z, query[None]])[None]
    u = e[torch.cat([tokens, k_star[None]])][None]
    table = ChunkTable.build(1, LENGTH + 1, LENGTH)
    v = target(u, None, None, table, shift=shift)
    out, _ = scan(chunk, v, None, table, lr=LR)
    return e @ out[0, -1], eps, c_norm2, c_align, int(v_star), int(k_star)


def test_next_token_target_raises_the_right_logit_by_at_least_the_bound():
    change, eps, c_norm2, c_align, v_star, _ = logit_changes(shift=1)
    slack = 1e-12
    assert change[v_star] >= LR * c_norm2 * c_align - slack
    others = torch.cat([change[:v_star], change[v_star + 1 :]])
    assert others.abs().max() <= LR * eps * c_align + slack
    assert change.argmax() == v_star
    assert LR * c_norm2 * c_align > 3 * LR * eps * c_align, "the bounds must tell the two targets apart"


def test_reconstruction_target_leaves_the_right_logit():
    change, eps, _, c_align, v_star, k_star = logit_changes(shift=0)
    assert abs(change[v_star]) <= LR * eps * c_align + 1e-12
    assert change.argmax() == k_star, "it strengthens the token that is there already"
