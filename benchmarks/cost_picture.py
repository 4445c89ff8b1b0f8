"""The plots of the cost benchmark: one panel for each picture's lines."""

from matplotlib.figure import Figure

from cost_sections import Points
from forwax.lab import style

AXES = {
    "batch": ("batch", "time over backprop's"),
    "width": ("width", "time over backprop's"),
    "tangents": ("rank-1 tangents", "time over backprop's"),
    "depth": ("layers", "time over one evaluation's"),
    "memory, sequences": ("steps of a tanh-RNN", "temporaries, MiB"),
}
COLOURS = {
    "backprop": "backprop",
    "rank-1": "forward",
    "R_f, rank-1": "forward",
    "R_b": "backprop",
}


@style.styled
def draw(points: Points) -> Figure:
    """All pictures that have points, side by side in rows of three."""
    names = list(points.lines)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = style.new_figure(4.4 * columns, 3.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, panel in zip(names, panels, strict=False):
        for i, (line, found) in enumerate(points.lines[name].items()):
            x, y = zip(*found, strict=True)
            panel.plot(
                x,
                y,
                marker="o",
                markersize=4,
                label=line,
                color=style.colour(COLOURS.get(line, line), i + 1),
            )
        ticks = sorted({x for found in points.lines[name].values() for x, _ in found})
        memory = name.startswith("memory")
        across, up = AXES.get(name, ("layers", "temporaries, MiB"))
        panel.set(
            title=(name[0].upper() + name[1:]).replace(
                "MLP by scan over layers", "layers by scan"
            ),
            xlabel=across,
            ylabel=up,
            xscale="log",
            yscale="log" if memory else "linear",
        )
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.minorticks_off()
        if not memory:
            panel.set_ylim(
                0, 1.4 * panel.get_ylim()[1]
            )  # the legend has room above the lines
        panel.legend(loc="upper left")
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    return figure
