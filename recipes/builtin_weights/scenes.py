"""The kinds of scenes that the built-in weights were made from, beside those of the package."""

from functools import partial

from finestsam.data.synthetic import FACADES, SHAPES, Kind, render_shapes
from recipes.builtin_weights.drawing import render_blobs, render_things
from recipes.builtin_weights.quarters import render_quarters
from recipes.builtin_weights.scenery import render_scenery
from recipes.builtin_weights.town_plans import render_parcels, render_plans

KINDS = {
    "shapes": SHAPES,
    "parcels": Kind("parcel", render_parcels),
    "blobs": Kind("blob", render_blobs),
    "plans": Kind("block", render_plans),
    "things": Kind("thing", render_things),
    "quarters": Kind("quarter", render_quarters),
    "pebbles": Kind("pebble", partial(render_shapes, scale=0.4)),
    "grains": Kind("grain", partial(render_blobs, scale=0.4)),
    "scenery": Kind("body", render_scenery),
    "facades": FACADES,  # which the weights have not seen, for the demo to teach
}
