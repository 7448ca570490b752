// Where the cells of a figure's heatmaps are, and to which one an arrow key leads.

export const nameIn = (custom) => {
  const name = Array.isArray(custom) ? custom[0] : custom;
  return typeof name === "string" && name ? [name] : [];
};

// Every heatmap cell in view, in pixels of the figure. Plotly has no public way to ask for
// this; calcdata holds the cell edges, _plots the axes with their pixel offsets.
export function cellsInView(gd) {
  return (gd.calcdata ?? []).flatMap(([first], curve) => {
    const { trace, x, y, z } = first ?? {};
    if (trace?.type !== "heatmap" || trace.visible !== true || !z) return [];
    // A veil over other cells answers neither pointer nor keys.
    if (trace.hoverinfo === "skip") return [];
    const subplot = trace.xaxis + trace.yaxis;
    const { xaxis, yaxis } = gd._fullLayout._plots[subplot];
    const label = (axis, low, high) =>
      axis.type === "category" ? axis._categories[Math.round((low + high) / 2)] : (low + high) / 2;
    return z.flatMap((values, row) => Array.from(values, (value, column) => {
      const [x0, x1, y0, y1] = [x[column], x[column + 1], y[row], y[row + 1]];
      const [a, b, c, d] = [xaxis.c2p(x0), xaxis.c2p(x1), yaxis.c2p(y0), yaxis.c2p(y1)];
      const [midX, midY] = [(a + b) / 2, (c + d) / 2];
      if (!(midX >= 0 && midX <= xaxis._length && midY >= 0 && midY <= yaxis._length)) return [];
      return [{
        id: `${curve}/${row}/${column}`, subplot, xaxis, yaxis, value,
        names: nameIn(trace.customdata?.[row]?.[column]),
        xval: (x0 + x1) / 2, yval: (y0 + y1) / 2,
        x: label(xaxis, x0, x1), y: label(yaxis, y0, y1),
        midX: midX + xaxis._offset, midY: midY + yaxis._offset,
        left: Math.min(a, b) + xaxis._offset, top: Math.min(c, d) + yaxis._offset,
        width: Math.abs(b - a), height: Math.abs(d - c),
      }];
    }).flat());
  });
}

// The nearest cell in a direction, judged by pixels, so that reversed axes and several
// heatmaps in one figure need no thought. Undefined at the edge.
export function neighbour(cells, here, [stepX, stepY]) {
  const cost = (cell) => {
    const [right, down] = [cell.midX - here.midX, cell.midY - here.midY];
    const along = right * stepX + down * stepY;
    const across = Math.abs(right * stepY) + Math.abs(down * stepX);
    return along > 1 ? along + 3 * across : Infinity;
  };
  const best = cells.reduce((a, b) => (cost(b) < cost(a) ? b : a));
  return cost(best) < Infinity ? best : undefined;
}
