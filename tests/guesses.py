"""Random hypotheses that can be meant: a strategy for the tests of hypotheses and of the scrubbing engine."""

from hypothesis import strategies as st

from circuit_generalization.circuit import Component
from circuit_generalization.hypotheses import ALL, EACH, EMBED, OWN, REST, UNIMPORTANT, Claim, Hypothesis

FEATURES = ((), ("x",), ("y",), ("x", "token@S"))  # of the prompts that the engine's tests make


@st.composite
def hypotheses(draw, layers=3, heads=4, roles=("END", "S", "T"), parallel=False):
    "Each claim is made by its reader, from the logits down, so that all are read and all are upstream."
    universe, claims = draw(st.sampled_from(("heads", "heads+mlps"))), {}

    def places(at):
        some = st.lists(st.sampled_from(roles), min_size=1, max_size=2, unique=True).map(tuple)
        return draw(st.one_of(some, st.just((ALL,))).filter(lambda p: at is None or {ALL, EACH} & {*p, *at} or {*p} & {*at}))

    def nodes(before, same_layer, taken):
        found = [Component(i, j) for i in range(before + same_layer) for j in range(heads)]
        if universe == "heads+mlps": found += [Component(i) for i in range(before)]
        found = [str(c) for c in found if str(c) not in taken] + [EMBED] * (EMBED not in taken)
        first = draw(st.sampled_from(found))
        alike = [n for n in found if first != EMBED and n != EMBED and (n[0] == first[0]) and n != first]
        return (first, *draw(st.lists(st.sampled_from(alike), max_size=1))) if alike else (first,)

    def claim(before, same_layer, at, taken, depth):
        name, who = f"c{len(claims)}", nodes(before, same_layer, taken)
        claims[name] = None  # the name is taken
        taken.update(who)
        feature = draw(st.sampled_from((None, *FEATURES)))
        if draw(st.integers(0, 5)) == 0: claims[name] = Claim(name, who, (EACH,), draw(st.sampled_from((None, *FEATURES, ("token",)))))
        else:
            bare = Claim(name, who, places(at), feature)
            reads = None if who == (EMBED,) or depth == 0 or draw(st.booleans()) else {}
            if reads is not None:
                for x in draw(st.lists(st.sampled_from(bare.inputs), unique=True)):
                    at = bare.positions if x in ("q", "in") else None
                    reads[x] = (OWN,) if draw(st.booleans()) else inputs(bare.layers[0], x == "in" and not parallel, at, depth - 1)
            takes = feature and ALL not in bare.positions and draw(st.booleans())
            claims[name] = Claim(name, who, bare.positions, feature, reads, draw(st.sampled_from(("subspace 1", "fitted"))) if takes else None)
        return name

    def inputs(before, same_layer, at, depth):
        taken, names = set(), ()
        for _ in range(draw(st.integers(0, 2))):
            if before or same_layer or not taken: names += (claim(before, same_layer, at, taken, depth),)
        if draw(st.booleans()):
            name = f"c{len(claims)}"
            claims[name] = Claim(name, (REST,), feature=draw(st.sampled_from((None, *FEATURES))))
            names += (name,)
        return names

    output = inputs(layers, False, ("END",), 2)
    words = st.text(st.one_of(st.just("\n"), st.characters(exclude_categories=["C", "Zl", "Zp"])), max_size=8)
    return Hypothesis(tuple(claims.values()), output, draw(words) or "guess", draw(st.sampled_from((None, "ioi"))), None, universe,
                      draw(st.sampled_from(UNIMPORTANT)), draw(words))
