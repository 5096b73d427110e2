/** Mean and spread of several runs' curves. */

export type Curve = { x: readonly (number | null)[]; values: readonly (number | null)[] };
export type Band = { x: number[]; mean: number[]; low: number[]; high: number[] };

/** Points of a curve that have a place and a value. */
function points(curve: Curve): [x: number[], y: number[]] {
  const x: number[] = [];
  const y: number[] = [];
  curve.x.forEach((at, index) => {
    const value = curve.values[index];
    if (at === null || value === null || value === undefined) return;
    x.push(at);
    y.push(value);
  });
  return [x, y];
}

/**
 * Mean ± one standard deviation (n − 1) at every x that any curve has, with straight lines between a curve's own points. A curve counts
 * only between its first and its last point; where it is alone the band has no width.
 */
export function band(curves: readonly Curve[]): Band {
  const all = curves.map(points).filter(([x]) => x.length);
  const x = [...new Set(all.flatMap(([own]) => own))].sort((a, b) => a - b);
  const places = all.map(() => 0);
  const found: Band = { x, mean: [], low: [], high: [] };
  for (const at of x) {
    const values: number[] = [];
    all.forEach(([own, y], index) => {
      if (at < own[0]! || at > own.at(-1)!) return;
      while (places[index]! < own.length - 2 && own[places[index]! + 1]! < at) places[index]!++;
      const i = places[index]!;
      const next = Math.min(i + 1, own.length - 1);
      const width = own[next]! - own[i]!;
      values.push(width ? y[i]! + ((y[next]! - y[i]!) * (at - own[i]!)) / width : y[i]!);
    });
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const sd = values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)) : 0;
    found.mean.push(mean);
    found.low.push(mean - sd);
    found.high.push(mean + sd);
  }
  return found;
}
