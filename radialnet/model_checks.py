"""What the fields of the model, its cache and its router must be, each and together; else ConfigError."""

from radialnet.checks import at_least, one_of, require, told_groups
from radialnet.sections import (
    ATTENTION_BACKENDS,
    ESTIMATORS,
    EXIT_FORMS,
    FIXED_FORMS,
    GROUPED_BACKENDS,
    MLPS,
    NETWORKS,
    NORMS,
    PAGE_SIZE,
    POSITIONS,
    TRAINED_FORMS,
    VIEWS,
    ModelConfig,
    RouterConfig,
    Sections,
)


def validate_model(config: Sections) -> None:
    model, view = config.model, config.cache.view
    at_least("model", model, 1, "pool_size", "max_depth", "d_model", "num_heads", "num_kv_heads", "d_ff")
    at_least("model", model, 0, "min_depth", "prelude_layers", "coda_layers")
    one_of("config.model.init", model.init, ("distinct", "clones", "upcycle"))
    one_of("config.model.norm", model.norm, NORMS)
    one_of("config.model.mlp", model.mlp, MLPS)
    one_of("config.model.positions", model.positions, POSITIONS)
    longest = config.train.seq_len if model.positions == "learned" else 0
    require(
        model.max_positions >= longest and (longest or not model.max_positions),
        f"config.model.max_positions={model.max_positions}: at least config.train.seq_len={longest} is needed"
        if longest
        else f"config.model.max_positions={model.max_positions}: 0 is needed with config.model.positions='rotary'",
    )
    one_of("config.model.dtype", model.dtype, ("float32", "bfloat16"))
    one_of("config.model.grouped_backend", model.grouped_backend, ("auto", *GROUPED_BACKENDS))
    one_of("config.model.attention_backend", model.attention_backend, ("auto", *ATTENTION_BACKENDS))
    one_of("config.model.remat", model.remat, ("none", "step"))
    one_of("config.cache.view", view, VIEWS)
    one_of("config.cache.when_full", config.cache.when_full, ("error", "slide"))
    capacity = config.cache.capacity
    require(
        capacity == 0 or capacity >= PAGE_SIZE,
        f"config.cache.capacity={capacity}: 0 or at least {PAGE_SIZE}, a page, is needed",
    )
    require(model.rope_base > 1, f"config.model.rope_base={model.rope_base}: more than 1 is needed")
    require(model.norm_eps > 0, f"config.model.norm_eps={model.norm_eps}: more than 0 is needed")
    require(
        model.d_model % model.num_heads == 0,
        f"config.model.num_heads={model.num_heads} does not divide config.model.d_model={model.d_model}",
    )
    require(
        model.head_size % 2 == 0,
        f"config.model.num_heads={model.num_heads} gives config.model.d_model={model.d_model} an odd head size of "
        f"{model.head_size}; an even one is needed",
    )
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_kv_heads={model.num_kv_heads} does not divide config.model.num_heads={model.num_heads}",
    )
    require(
        model.min_depth <= model.max_depth,
        f"config.model.min_depth={model.min_depth} is more than config.model.max_depth={model.max_depth}",
    )
    require(
        model.max_depth > 1 or view in ("all", "latest"),
        f"config.cache.view={view!r} needs more than one depth step, config.model.max_depth={model.max_depth}: "
        "with one, every view is 'all'",
    )
    require(
        (model.init == "upcycle") == bool(model.upcycle_from),
        f"config.model.init={model.init!r} with config.model.upcycle_from={model.upcycle_from!r}: "
        "a run folder goes with 'upcycle' and with nothing else",
    )
    require(
        model.init != "upcycle" or not config.router.is_in_order or model.pool_size == model.max_depth,
        f"config.model.init='upcycle' gives each step a group of layers, of which config.router.form="
        f"{config.router.form!r} executes one: config.model.pool_size={model.pool_size} must equal "
        f"config.model.max_depth={model.max_depth}",
    )
    require(
        0 <= model.num_groups <= model.max_depth,
        f"config.model.num_groups={model.num_groups}: 0 to config.model.max_depth={model.max_depth} is needed",
    )
    require(
        not config.router.is_in_order or model.num_groups in (0, model.max_depth),
        f"config.model.num_groups={model.num_groups}: config.router.form={config.router.form!r} has its layers in "
        "order; 0 is needed",
    )
    require(
        model.init == "distinct" or model.pool_size >= model.num_layer_groups,
        f"config.model.init={model.init!r} needs a layer for each group, but "
        f"config.model.pool_size={model.pool_size} is less than {told_groups(model)}",
    )


def validate_router(config: Sections) -> None:
    model, router = config.model, config.router
    one_of("config.router.form", router.form, TRAINED_FORMS + FIXED_FORMS)
    one_of("config.router.estimator", router.estimator, ESTIMATORS)
    one_of("config.router.prior", router.prior, ("none", "sequential", "group", "hash", "group_hash"))
    one_of("config.router.network", router.network, NETWORKS)
    one_of("config.router.exit_training", router.exit_training, ("gate", "benefit"))
    one_of("config.router.exit_sees", router.exit_sees, ("state", "token"))
    require(
        router.exit_sees == "state" or router.exit_training == "benefit",
        f"config.router.exit_sees={router.exit_sees!r} is for config.router.exit_training='benefit', "
        f"got {router.exit_training!r}",
    )
    one_of("config.router.depth_loss", router.depth_loss, ("price", "target"))
    non_negative = (
        "hidden",
        "prior_weight",
        "prior_steps",
        "noise",
        "noise_steps",
        "load_coef",
        "z_coef",
        "depth_coef",
        "read_coef",
    )
    at_least("router", router, 0, *non_negative)
    at_least("router", router, 1, "every", "read_every")
    require(
        router.every == 1 or router.form in ("factored", "flat"),
        f"config.router.every={router.every} is for the forms factored and flat, config.router.form={router.form!r}",
    )
    at_least("router", router, 0, "exit_warmup_steps", "depth_ramp_steps", "exit_bias_rate", "load_bias_rate")
    require(
        1 <= router.hash_span <= model.max_depth,
        f"config.router.hash_span={router.hash_span} is not between 1 and config.model.max_depth={model.max_depth}",
    )
    of_prior = f" with config.router.prior={router.prior!r}" if router.form in ("factored", "flat") else ""
    require(
        router.hash_span == 1 or router.hashes,
        f"config.router.hash_span={router.hash_span} needs a hash that says where tokens go: "
        f"config.router.form={router.form!r}{of_prior} has none",
    )
    require(0 <= router.explore < 1, f"config.router.explore={router.explore}: at least 0 and less than 1 is needed")
    if router.exit_training == "benefit":
        _validate_benefit(model, router)
    if validate := _OF_FORM.get(router.form):
        validate(model, router)
    require(
        router.form in ("factored", "flat") or not (router.is_trained and router.load_bias_rate),
        f"config.router.load_bias_rate={router.load_bias_rate}: config.router.form={router.form!r} chooses no layers, "
        "0 is needed",
    )
    if router.form in (*EXIT_FORMS, "skip", "mod", "recursion"):
        require(
            router.estimator != "dense",
            f"config.router.estimator='dense' is for forms that choose a layer, config.router.form={router.form!r}",
        )
    if not router.is_trained:
        return
    of_form = f"config.router.form={router.form!r}"
    of_groups = of_form if router.gives_layers else f"config.router.prior={router.prior!r}"
    require(
        not router.needs_groups or model.pool_size >= model.num_layer_groups,
        f"{of_groups} needs a layer for each group, but "
        f"config.model.pool_size={model.pool_size} is less than {told_groups(model)}",
    )
    require(
        router.noise == 0 or router.form not in ("mod", "recursion"),
        f"config.router.noise={router.noise}: config.router.form={router.form!r} draws none, 0 is needed",
    )
    require(
        router.noise == 0 or router.noise_steps > 0,
        f"config.router.noise={router.noise} needs steps to fade over, config.router.noise_steps={router.noise_steps}",
    )
    require(
        model.min_depth == model.max_depth or model.min_depth <= router.depth_target <= model.max_depth,
        f"config.router.depth_target={router.depth_target} is not between config.model.min_depth={model.min_depth} "
        f"and config.model.max_depth={model.max_depth}",
    )


def _validate_benefit(model: ModelConfig, router: RouterConfig) -> None:
    of_benefit = "config.router.exit_training='benefit'"
    require(
        router.form in ("factored", *EXIT_FORMS) or not router.is_trained,
        f"{of_benefit} is for the forms factored, {' and '.join(EXIT_FORMS)}, config.router.form={router.form!r}",
    )
    require(
        model.coda_layers == 0,
        f"{of_benefit} reads states as the head would: config.model.coda_layers={model.coda_layers}, 0 is needed",
    )
    require(
        router.depth_coef == 0,
        f"{of_benefit} has no expected depth: config.router.depth_coef={router.depth_coef}, 0 is needed",
    )
    require(
        router.exit_sees == "state" or router.explore > 0,
        f"config.router.exit_sees={router.exit_sees!r} learns no more of a token once it always leaves: "
        f"config.router.explore={router.explore}, more than 0 is needed",
    )


def _validate_recursion(model: ModelConfig, router: RouterConfig) -> None:
    require(
        model.max_depth % model.pool_size == 0,
        f"config.router.form='recursion' goes through the pool in whole rounds: config.model.max_depth="
        f"{model.max_depth} must be a multiple of config.model.pool_size={model.pool_size}",
    )
    require(
        model.min_depth == model.max_depth or model.fewest_rounds * model.pool_size < model.max_depth,
        f"config.model.min_depth={model.min_depth} leaves a single number of rounds of config.model.pool_size="
        f"{model.pool_size} layers to choose: config.model.max_depth={model.max_depth} is needed, which says so, or "
        "more rounds",
    )
    require(
        router.depth_coef == 0 and router.explore == 0,
        f"config.router.form='recursion' holds its depth by config.router.exit_bias_rate alone: "
        f"config.router.depth_coef={router.depth_coef} and explore={router.explore}, 0 is needed",
    )


def _validate_mod(model: ModelConfig, router: RouterConfig) -> None:
    require(
        2 <= router.capacity_every <= model.max_depth,
        f"config.router.capacity_every={router.capacity_every}: at least 2, for all tokens execute the first step, "
        f"and at most config.model.max_depth={model.max_depth} is needed",
    )
    require(
        0 < router.capacity <= 1,
        f"config.router.capacity={router.capacity}: more than 0 and at most 1 is needed",
    )
    require(
        model.min_depth == model.max_depth,
        f"config.router.form='mod' has no exits: config.model.min_depth={model.min_depth} must equal "
        f"config.model.max_depth={model.max_depth}",
    )


def _validate_skip(model: ModelConfig, router: RouterConfig) -> None:
    of_skip = "config.router.form='skip'"
    require(
        model.max_depth <= model.pool_size,
        f"{of_skip} has a layer for each step: config.model.max_depth={model.max_depth} is more than "
        f"config.model.pool_size={model.pool_size}",
    )
    require(
        router.depth_coef == 0 and router.explore == 0,
        f"{of_skip} holds its depth by config.router.exit_bias_rate alone: config.router.depth_coef="
        f"{router.depth_coef} and explore={router.explore}, 0 is needed",
    )


def _validate_sequential(model: ModelConfig, router: RouterConfig) -> None:
    require(
        model.pool_size == model.max_depth,
        f"config.router.form='sequential' is a plain dense run: config.model.pool_size={model.pool_size} "
        f"must equal config.model.max_depth={model.max_depth} (form='cyclic' repeats a smaller pool)",
    )


_OF_FORM = {
    "recursion": _validate_recursion,
    "mod": _validate_mod,
    "skip": _validate_skip,
    "sequential": _validate_sequential,
}
