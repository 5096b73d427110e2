/** Series as a chart takes them. */

export interface Line {
  name: string;
  /** Ascending. */
  x: ArrayLike<number>;
  y: ArrayLike<number | null>;
  /** Index into the palette. */
  colour: number;
  dashed?: boolean;
  faint?: boolean;
  /** Drawn as the ground between `low` and `high` (same length as x), behind the line. */
  band?: { low: ArrayLike<number | null>; high: ArrayLike<number | null> };
}

/**
 * Exponential moving average with debiased start (as TensorBoard's): weight in [0, 1), 0 changes nothing; null stays null.
 * Weighted by distance in x, so that a downsampled series is smoothed as the whole one would be.
 */
export function smoothed(x: ArrayLike<number>, y: ArrayLike<number | null>, weight: number): (number | null)[] {
  if (weight <= 0) return Array.from(y);
  const span = x.length > 1 ? (x[x.length - 1]! - x[0]!) / Math.min(1000, x.length - 1) || 1 : 1;
  let sum = 0;
  let norm = 0;
  let last: number | null = null;
  return Array.from(y, (value, i) => {
    if (value === null || !Number.isFinite(value)) return null;
    const keep: number = last === null ? weight : weight ** Math.max(1e-9, (x[i]! - last) / span);
    last = x[i]!;
    sum = sum * keep + (1 - keep) * value;
    norm = norm * keep + (1 - keep);
    return sum / norm;
  });
}

/** Lines over one common x, with gaps (undefined) where a line has no point: what uPlot draws. */
export function aligned(lines: readonly Line[], weight: number): { x: number[]; columns: (number | null | undefined)[][] } {
  const columns = lines.flatMap((line) => {
    const all: ArrayLike<number | null>[] = [smoothed(line.x, line.y, weight)];
    if (line.band) all.push(line.band.low, line.band.high);
    return all.map((values) => ({ x: line.x, values }));
  });
  const first = lines[0];
  if (first && lines.every((line) => sameX(line.x, first.x))) {
    return { x: Array.from(first.x), columns: columns.map((one) => Array.from(one.values)) };
  }
  const x = [...new Set(lines.flatMap((line) => Array.from(line.x)))].sort((a, b) => a - b);
  const places = new Map(x.map((value, index) => [value, index]));
  return {
    x,
    columns: columns.map(({ x: own, values }) => {
      const column = new Array<number | null | undefined>(x.length); // holes: uPlot draws over them
      for (let i = 0; i < own.length; i++) column[places.get(own[i]!)!] = values[i] ?? null;
      return column;
    }),
  };
}

function sameX(a: ArrayLike<number>, b: ArrayLike<number>): boolean {
  if (a === b) return true;
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}
