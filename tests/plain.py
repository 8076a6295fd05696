"""What a query sees in each view, and a radial network, in NumPy: what tests compare with."""

import jax
import numpy as np


def plain_network(config, params, token, document, position):
    """A radial network of one row: loops over steps, tokens, heads and seen entries.

    With `sequential` routes and L == T it is a plain pre-norm transformer; other routes are `factored`, without
    prior and exit bias. Returns logits [S, V] and depths [S].
    """
    model, seq = config.model, len(token)
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_size
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale, bias=None):
        if bias is not None:
            return (x - x.mean()) / np.sqrt(x.var() + model.norm_eps) * scale + bias
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps) * scale

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    def gelu(x):
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    def activation(x):
        if model.mlp == "swiglu":
            return x[0] / (1 + np.exp(-x[0])) * x[1]
        if model.mlp == "relu":
            return np.maximum(x[0], 0)
        return gelu(x[0])

    def turn(x_HK, at):
        if model.positions == "learned":
            return x_HK
        angle = at * model.rope_base ** (-np.arange(size // 2) / (size // 2))
        left, right = x_HK[:, : size // 2], x_HK[:, size // 2 :]
        turned = [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)]
        return np.concatenate(turned, axis=-1)

    def decide(h, t):
        """Layer (None: leave), and the value of the gate's factor for the layer and for staying."""
        if config.router.form == "sequential":
            return t, 1.0, 1.0
        router = params["router"]
        x = norm(h, router["norm"]) + router["step_embedding"][t]
        logits = gelu(x @ router["hidden"]) @ router["out"]
        *layers, leave = logits + router["out_bias"]
        p, layer = softmax(np.asarray(layers)), int(np.argmax(layers))
        may_leave = t >= model.min_depth
        stay = 1 / (1 + np.exp(leave)) if may_leave else 1.0
        factors = (p[layer], stay) if config.router.estimator == "weighted" else (1.0, 1.0)
        return (None if may_leave and leave > 0 else layer), *factors

    h = params["embedding"][token] * model.d_model**0.5
    if model.positions == "learned":
        h += params["positions"][position]
    active, survival, depth = [True] * seq, np.ones(seq), np.zeros(seq, int)
    layer_TS = np.full((model.max_depth, seq), model.pool_size)
    entries = {}
    for t in range(model.max_depth):
        queries = {}
        for i in range(seq):
            layer, p, stay = decide(h[i], t) if active[i] else (None, 1.0, 1.0)
            survival[i] *= stay
            active[i] = layer is not None
            if layer is None:
                continue
            w = {name: array[layer] for name, array in params["pool"]["block"].items()}
            # Query heads, key and value of each group of heads, side by side.
            qkv = np.einsum("d,dgjk->gjk", norm(h[i], w["attention_norm"], w.get("attention_norm_bias")), w["qkv"])
            qkv += w.get("qkv_bias", 0)
            q, key, value = qkv[:, :-2].reshape(heads, size), qkv[:, -2], qkv[:, -1]
            queries[i] = w, p * survival[i], turn(norm(q, w["query_norm"]) if model.qk_norm else q, position[i])
            entries[t, i] = turn(norm(key, w["key_norm"]) if model.qk_norm else key, position[i]), value
            layer_TS[t, i] = layer
        for i, (w, gate, query) in queries.items():
            arrays = document[None], (layer_TS < model.pool_size)[:, None], layer_TS[:, None]
            seen = sorted(entries_seen(config.cache.view, *arrays, t, 0, i))
            mixed = np.zeros((heads, size))
            for head in range(heads):
                group = head // (heads // kv_heads)
                weights = softmax(np.array([entries[at][0][group] @ query[head] / size**0.5 for at in seen]))
                mixed[head] = sum(p * entries[at][1][group] for p, at in zip(weights, seen, strict=True))
            attended = mixed.ravel() @ w["attention_out"] + w.get("attention_out_bias", 0)
            x = norm(h[i] + attended, w["mlp_norm"], w.get("mlp_norm_bias"))
            hidden = activation(np.einsum("d,djf->jf", x, w["mlp_in"]) + w.get("mlp_in_bias", 0))
            h[i] = h[i] + gate * (attended + hidden @ w["mlp_out"] + w.get("mlp_out_bias", 0))
            depth[i] += 1
    final = np.stack([norm(x, params["final_norm"], params.get("final_norm_bias")) for x in h])
    return final @ params["head"], depth


def entries_seen(view, document, executes, layer, t, b, i):
    """(step, token) of the entries that the query of token i of row b sees at step t: those of the paper's rule that
    the view leaves in."""
    entries = [
        (s, j)
        for s in range(t + 1)
        for j in range(i + 1)
        if executes[s, b, j] and document[b, j] == document[b, i] and document[b, j] >= 0
    ]
    if view == "latest":
        return {(s, j) for s, j in entries if not any(s < later and j == k for later, k in entries)}
    if view == "same_step":
        return {(s, j) for s, j in entries if s == t}
    if view == "first":
        return {(s, j) for s, j in entries if s == 0}
    if view == "same_layer":
        return {(s, j) for s, j in entries if layer[s, b, j] == layer[t, b, i]}
    return set(entries)
