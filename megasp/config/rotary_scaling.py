"""What --rotary-scaling needs, by kind; and what nothing needs where no position rotates."""

from megasp.config.model import ModelConfig
from megasp.errors import ConfigError


def check_rotary_scaling(model: ModelConfig) -> None:
    """Refuse a scaling without what it needs, or with what it would ignore; and rotary options without rope."""
    for name in ("rotary_base", "rotary_percent"):
        value, flag = getattr(model, name), f"--{name.replace('_', '-')}"
        if model.position_embedding_type != "rope" and value != getattr(ModelConfig, name):
            raise ConfigError(
                f"{flag} {value:g} with position-embedding-type {model.position_embedding_type}",
                "it is of rotary positions",
                f"add --position-embedding-type rope, or leave {flag} out",
            )
    if model.rotary_scaling is None:
        return
    got = f"--rotary-scaling {model.rotary_scaling}"
    if model.position_embedding_type != "rope":
        raise ConfigError(got, "it scales rotary frequencies", "add --position-embedding-type rope")
    if model.rotary_scaling != "llama3" and model.rotary_scaling_factor is None:
        fix = "give --rotary-scaling-factor, such as 4 for four times the context"
        raise ConfigError(got, "it scales by a factor", fix)
    original = model.original_max_position_embeddings
    if model.rotary_scaling == "yarn" and original is None:
        rule = "which frequencies it scales depends on the context that the model was trained with"
        raise ConfigError(got, rule, "give --original-max-position-embeddings")
    if model.rotary_scaling in ("linear", "ntk") and original is not None:
        rule = "it scales by the factor alone"
        raise ConfigError(f"{got} with --original-max-position-embeddings {original}", rule, "leave the latter out")
    if model.rotary_scaling == "ntk" and int(model.head_dim * model.rotary_percent) < 4:
        got = f"{got} of {int(model.head_dim * model.rotary_percent)} channels"
        raise ConfigError(got, "it keeps the first frequency and scales the others", "use a larger head")
