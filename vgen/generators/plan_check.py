"""What a network refuses of a plan: orders that it was not built or trained for."""

from typing import TYPE_CHECKING

import torch

from vgen.errors import UserError
from vgen.generators.joint_text import JointText
from vgen.schedules.moves import moves_of
from vgen.schedules.plan import Plan

if TYPE_CHECKING:
    from vgen.generators.transformer import Transformer


def check_fits(generator: "Transformer", plan: Plan) -> None:
    """Refuse a plan that a network was not built for.

    Raises:
        UserError: naming the first requirement of the plan that the network does not meet.
    """
    if plan.grid != generator.grid:
        raise UserError(f"schedule '{plan.name}' covers the grid {plan.grid}, the generator the grid {generator.grid}")
    asks = generator.query_embedding is not None
    mine = (generator.num_condition, generator.num_readouts, generator.num_learned, asks, generator.mask_token)
    needs = (plan.num_condition, plan.num_heads, plan.num_learned, plan.has_queries, plan.masking is not None)
    if mine != needs:
        raise UserError(
            f"schedule '{plan.name}' needs (condition slots, output heads, learned embeddings, position queries, "
            f"mask token) = {needs}, the generator has {mine}: it was trained for another schedule; choose that one"
        )
    if (generator.latent_head is not None or isinstance(generator.condition, JointText)) and plan.masking is None:
        raise UserError(
            f"schedule '{plan.name}' hides no tokens; a generator of continuous tokens or of joint streams of text "
            "and tokens sees all slots in every pass: choose schedule=masked or masked_random"
        )
    if not generator.outputs and generator.latent_head is None and bool((torch.bincount(plan.reads[:, 2]) > 1).any()):
        raise UserError(
            f"schedule '{plan.name}' reads a token at several slots, which a generator with tied_output=true does "
            "not average; choose another, or set generator.tied_output=false"
        )
    if generator.latent_head is not None and plan.policy is not None:
        raise UserError(
            f"schedule '{plan.name}' goes by the probabilities of tokens, and continuous tokens have none; choose "
            "schedule=masked_random"
        )
    if plan.any_order and not (generator.told_target or plan.has_queries):
        raise UserError(
            f"schedule '{plan.name}' decodes in any order, so the generator must be told the place of the token it "
            "predicts; set generator.positions=own_target or generator.rope=own_target"
        )
    if generator.steps is not None and plan.num_slots > generator.steps.num_embeddings:
        raise UserError(
            f"schedule '{plan.name}' has {plan.num_slots} slots, more than the {generator.steps.num_embeddings} that "
            "generator.adaln=[step] knows; leave 'step' out for orders with queries"
        )
    if generator.places is not None and generator.places.num_places < plan.num_tokens:
        fed = plan.order[plan.position[plan.position >= 0]]
        if plan.any_order or bool((fed >= generator.places.num_places).any()):
            raise UserError(
                f"schedule '{plan.name}' feeds the last token of the grid, which has no position with "
                "generator.last_position=false; set it to true"
            )
    if generator.directions is not None:
        if plan.shuffled or plan.random_order is not None:
            raise UserError(
                f"schedule '{plan.name}' draws random orders, whose moves are not a fixed set; leave 'direction' "
                "out of generator.adaln"
            )
        if unknown := [move for move in moves_of(plan) if move not in generator.directions.moves]:
            raise UserError(
                f"schedule '{plan.name}' makes the move {list(unknown[0])}, which generator.directions does not "
                "list: the generator was trained for another schedule"
            )
