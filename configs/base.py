"""Every field of a run, its default and what it means. The other configs override this one.

The defaults are a small radial network with the recipe of docs/LOG.md: plain argmax routing with the straight-through
estimator, layers of a group born as clones, the group prior kept, and no exits (`min_depth == max_depth`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.pool_size = 16  # L: layers in the pool.
    model.max_depth = 4  # T: depth steps a token may take. It exits at T at the latest.
    model.min_depth = 4  # No exit before this many steps; == max_depth switches exits off.
    model.d_model = 128  # D: width of the residual stream.
    model.num_heads = 4  # H: query heads; head size K = D / H, which must be even (RoPE).
    model.num_kv_heads = 4  # G: key and value heads; divides H.
    model.d_ff = 384  # F: hidden size of the MLP.
    model.prelude_layers = 0  # Unshared layers before the first depth step; every token runs them.
    model.coda_layers = 0  # Unshared layers after the last one; every token runs them.
    # Groups that the pool is cut into, of layers side by side, for form=hash_exit, prior=group and group_hash,
    # init=clones and upcycle, optimizer.group_decay. Step t has group t; steps beyond the last group share it. 0: one
    # for each step.
    model.num_groups = 0
    model.init = "clones"  # distinct | clones (layers of a group start equal) | upcycle (from a dense run).
    model.upcycle_from = ""  # Run folder of the dense run that `init="upcycle"` starts from.
    model.rope_base = 10_000.0  # Base of the rotary position angles.
    model.qk_norm = True  # RMS-normalise queries and keys, for keys of different layers meet in one softmax.
    model.norm = "rms"  # rms | layer: RMSNorm; LayerNorm, which has a bias. The router's own is always RMSNorm.
    model.norm_eps = 1e-6  # Added to the mean square, or the variance, in every norm.
    model.mlp = "swiglu"  # swiglu (gated) | relu | gelu: what stands between the two products of the MLP.
    model.biases = False  # Whether the matrix products of layers have a bias.
    model.positions = "rotary"  # rotary | learned (a vector for each position, added to the embedding).
    model.max_positions = 0  # Positions that are learned; with positions="rotary" 0: no end.
    model.dtype = "float32"  # float32 | bfloat16: of the matrix products. Parameters and the router stay float32.
    model.grouped_backend = (
        "auto"  # block_loop | ragged_dot | pallas | masked_dense (the reference) | auto: by platform.
    )
    model.attention_backend = "auto"  # tiles | pallas (for GPUs and TPUs) | auto: by platform.
    model.remat = "none"  # none: keep what the layers computed for the backward pass | step: compute it again.

    config.router = router = ConfigDict()
    # factored | flat | early_exit (layers in turn) | hash_exit (one of step t's group, by the token; what is learned is
    # when to leave) | skip | mod | recursion; fixed: sequential | cyclic | random | hash.
    router.form = "factored"
    # straight_through | score | weighted | dense (costs L layers). Learned routes are 3 % better by weighted.
    router.estimator = "straight_through"
    router.network = "mlp"  # mlp (with GELU) | low_rank (two products, nothing between) | linear (one product).
    router.hidden = 0  # Width of the router's hidden layer, or its rank; 0 = d_model.
    router.sees_step = True  # Whether it adds an embedding of the depth step to the state that it looks at.
    # It looks at every this many-th step, and keeps its logits for those between; T: once per token. Where several rows
    # are generated, each of them at a step of its own, it is computed at every step all the same.
    router.every = 1
    # none | sequential (layer t mod L) | group (the layers of step t's group, model.num_groups) | hash (one by token
    # and step) | group_hash (one of step t's group, by the token). For routes that may differ from it: where they may
    # not, form=hash_exit has no logits of layers.
    router.prior = "group"
    # Wherever a hash counts: at step t it is that of the token t mod this many places before, or of the first one that
    # the row has of its document. 1: of the token itself.
    router.hash_span = 1
    router.prior_weight = 8.0  # Added to the layer logits that the prior favours.
    router.prior_steps = 0  # Training steps over which the prior fades to 0; 0 = it is kept.
    router.noise = 0.0  # Scale of the selection noise (1 samples from the router's probabilities).
    router.noise_steps = 0  # Training steps over which the noise fades to 0; needed when noise > 0.
    router.load_coef = 0.02  # Of the load-balancing loss.
    router.z_coef = 1e-3  # Of the router z-loss.
    router.depth_loss = "price"  # price (coef * E[depth]) | target (coef * (E[depth] - depth_target)^2).
    router.depth_coef = 0.0  # Of the depth loss.
    router.depth_target = 4.0  # d*: mean executed depth that the exit-bias controller holds.
    router.exit_warmup_steps = 0  # Training steps before the first exit is allowed.
    router.depth_ramp_steps = 0  # Training steps after the warm-up over which the target falls from T to d*.
    router.exit_bias_init = 0.0  # The exit bias before the controller's first update.
    router.exit_bias_rate = 0.1  # u of the controller: b += u * std(e) * clip(depth - d*, -1, 1). 0 = off.
    router.exit_training = "gate"  # gate: by the survival gate | benefit: e predicts what going on takes off the loss.
    # Of `benefit`, what e is predicted from: state (by a network) | token (a number for each step and token id: all
    # tokens of one id leave at the same step, whatever their context). The latter needs `explore`.
    router.exit_sees = "state"
    router.read_coef = 0.1  # Of `benefit`: of the cross-entropy at states between steps.
    # Of `benefit`: every this many-th token has one such state read. 1: each, as many products of the head again, and
    # gradients of the states of all T steps in memory.
    router.read_every = 1
    router.explore = 0.0  # Share of tokens that in training don't leave before T, whatever the router says.
    router.capacity = 0.5  # Of `mod`: share of a row's tokens that execute a step at which tokens compete.
    router.capacity_every = 2  # Of `mod`: tokens compete at every this many-th step, the last of each such round.
    router.load_bias_rate = 0.0  # Of the auxiliary-loss-free balancing: bias += rate * sign(1/L - load). 0 = off.

    config.cache = cache = ConfigDict()
    cache.view = "latest"  # all | latest | same_step | first | same_layer.
    cache.capacity = 0  # Entries that decoding may hold, of all rows together; 0 = as many as the memory has room for.
    cache.when_full = "error"  # error | slide: a row gives up its oldest tokens, and goes on without them.

    config.data = data = ConfigDict()
    # stdlib (Python's own standard library) | text (files) | jsonl | hf (datasets of Hugging Face) | tfds |
    # tokens (.npy files with a document's ids in each row) | mixture (of those) | hops (generated).
    data.source = "stdlib"
    data.path = ""  # File or folder; of hf and tfds also a name.
    data.subset = ""  # Of hf: the configuration of a data set that has several.
    data.split = "train"  # Of hf and tfds: what is read. Some of it is held out, eval_fraction.
    data.text_key = "text"  # The field of a JSON line, or of a row of hf and tfds, that holds the document.
    data.mixture = ""  # "0.7 jsonl books.jsonl; 0.3 hf notes text_key=body": weight, source, path, other fields.
    data.streaming = False  # Of hf: read as it comes, without a copy on disk. A run that goes on is not an exact one.
    # bpe (byte-level, trained on the training split) | byte | a file: tokenizer.json, or a .model of SentencePiece.
    data.tokenizer = "bpe"
    data.vocab_size = 4096  # V: of the BPE, special token included. Other tokenizers have their own.
    data.eval_fraction = 0.05  # Share of the documents held out, chosen by the hash of their content.
    data.hops_symbols = 16  # n: symbols of a held-out row of `hops`, of an alphabet of 16; in training 2…n.
    data.hops_max = 8  # K: a query of `hops` needs 1…K look-ups; K < n. Beyond n/2 they are fewer backwards.
    data.cache_dir = "~/.cache/radialnet"  # Tokenizers, tokenised documents and compiled programs; shared by runs.

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3  # Peak; linear warm-up, then cosine decay over train.num_steps.
    optimizer.warmup_steps = 50  # At most a tenth of train.num_steps is used.
    optimizer.final_fraction = 0.1  # Learning rate at the end, as a fraction of the peak.
    # Learning rate of the router, what predicts exits included, as a multiple of that of all else. A tenth keeps
    # learned routes where they are from one step to the next (docs/LOG.md).
    optimizer.router_scale = 1.0
    optimizer.b2 = 0.98  # Decay of AdamW's second moment; b1 is 0.9.
    optimizer.weight_decay = 0.01  # On matrices only.
    # Of all weights of the pool's layers, towards the mean of their group (model.num_groups): a group is one layer, and
    # what each of its layers needs beside that. 0 = none.
    optimizer.group_decay = 0.0
    # γ of the first step; over group_decay_steps it falls to group_decay, by the same factor each step. Both 0:
    # group_decay throughout; for no pull set all three to 0. About 0.6 of the run's steps were good (radial_mini).
    optimizer.group_decay_init = 0.0
    optimizer.group_decay_steps = 0
    optimizer.clip_norm = 1.0  # Global gradient norm.
    optimizer.frozen = ""  # By commas, parts that stay as they began: embedding, head, final_norm, pool, router, …
    optimizer.low_rank = 0  # r: the pool's matrices change by products of this rank; 0 = as they will.

    config.train = train = ConfigDict()
    train.num_steps = 1000  # Optimizer steps.
    train.batch_size = 16  # B: rows a step.
    train.seq_len = 128  # S: tokens a row.
    train.teacher = ""  # Run folder of a model whose predictions are learned, by its newest checkpoint; empty = none.
    train.distill_weight = 1.0  # Of KL(teacher, model) in the loss; the cross-entropy of the text has the rest, of 1.
    train.accumulate_steps = 1  # Parts of a batch, one after the other to save memory; router losses: means over parts.
    train.seed = 0  # Of initialisation, data order and selection noise.
    train.max_skipped_steps = 10  # Non-finite updates in a row that end the run with exit code 3 at the next log line.
    # Updates whose loss or gradient norm is that many standard deviations above the mean of the last 128 are skipped;
    # 0 = none is, 6 = spikes.
    train.spike_sigmas = 0.0
    train.stall_factor = 30.0  # Times a usual step without progress, and all stacks are written to stderr; 0 = never.

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = 250  # Held-out evaluation; the end of the run is always evaluated. 0 = only then.
    evaluation.num_batches = 0  # Held-out batches of train.batch_size rows; 0 = all of them.

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # The end of the run is always saved. 0 = only then.
    checkpoint.keep = 2  # Newest checkpoints kept.
    checkpoint.keep_every = 0  # Besides, those of each so many steps are kept for good; 0 = none.

    config.mesh = mesh = ConfigDict()
    # Sizes of the device mesh (sharding.py); one of them may be -1, the devices that the others leave.
    mesh.data = -1  # Copies of the parameters; split: the batch.
    mesh.fsdp = 1  # Split: the batch, and each parameter's width.
    mesh.pool = 1  # Split: the batch, and the layers of the pool.
    mesh.tensor = 1  # Split: heads and hidden units of each layer.
    # gather: layers come to the tokens, once a step | exchange: tokens go to the layers, at each depth step | auto.
    mesh.pool_dispatch = "auto"

    config.log = log = ConfigDict()
    log.every_steps = 10  # Training lines in metrics.jsonl.
    # Besides metrics.jsonl, by commas: tensorboard, wandb, trackio (docs/TRACKING.md); empty = nothing besides.
    log.writers = "tensorboard"
    log.project = "radialnet"  # Where wandb and trackio file the run.
    log.profile_steps = ""  # "first,last": an XProf trace of those training steps goes to DIR/profile; empty = none.
    log.alarms = "warn"  # What signs of a router gone wrong lead to (alarms.py): off | warn | stop, exit code 4.
    log.sample_prompt = "def "  # A continuation of this is logged at the end of the run; empty = none.
    log.sample_tokens = 64  # Its length in tokens.

    return config
