/** Curves of many runs, grouped by what their specs say, with a band over each group. */

import type { Job } from "../../lib/api";
import { flat, setting } from "../../lib/format";

export type Axis = "step" | "epoch" | "seconds";
export type BandKind = "none" | "sd" | "range";

export interface Curve {
  job: string;
  run: string;
  state: string;
  total: number;
  /** Rising. */
  x: number[];
  values: (number | null)[];
}
export interface Comparison {
  name: string;
  x: Axis;
  has_more: boolean;
  data: Curve[];
}

/** One line of the picture: a run, or the mean of a group with its band. */
export interface Drawn {
  id: string;
  label: string;
  /** Index into the palette. */
  colour: number;
  x: ArrayLike<number>;
  y: ArrayLike<number | null>;
  band?: { low: Float64Array; high: Float64Array };
}

/** What does not make another configuration: names, seeds, and how a run is kept and served. */
const ASIDE = /^(name|seed|priority|labels|retention|webhook|limits|resources|checkpoint|export)(\.|$)/;
const GRID = 300;

/** The settings of each job that tell the jobs apart, by dotted name. */
export function differences(jobs: readonly Job[]): string[] {
  const specs = jobs.map((job) => flat(job.spec));
  const names = [...new Set(specs.flatMap((spec) => Object.keys(spec)))];
  return names.filter((name) => !ASIDE.test(name) && new Set(specs.map((spec) => JSON.stringify(spec[name]))).size > 1);
}

/** By job: the group it is in. by: "config" (all but the seed), label.KEY, spec.FIELD, or "" for each run alone. */
export function groupsOf(jobs: readonly Job[], by: string): Map<string, string> {
  const differing = by === "config" ? differences(jobs) : [];
  return new Map(
    jobs.map((job) => {
      if (by.startsWith("label.")) return [job.id, `${by.slice(6)}=${job.labels[by.slice(6)] ?? "–"}`];
      const spec = flat(job.spec);
      const names = by === "config" ? differing : by.startsWith("spec.") ? [by.slice(5)] : [];
      if (!names.length) return [job.id, by === "config" ? "all runs" : job.id];
      return [job.id, names.map((name) => `${name.split(".").at(-1)}=${spec[name] === undefined ? "–" : setting(spec[name])}`).join(", ")];
    }),
  );
}

/** Between its points on a straight line; null before the first and after the last. */
export function valueAt(curve: Pick<Curve, "x" | "values">, at: number): number | null {
  const { x, values } = curve;
  if (!x.length || at < x[0]! || at > x[x.length - 1]!) return null;
  const after = firstFrom(x, at);
  const high = values[after] ?? null;
  if (x[after] === at || after === 0) return high;
  const low = values[after - 1] ?? null;
  if (high === null || low === null) return null;
  return low + ((high - low) * (at - x[after - 1]!)) / (x[after]! - x[after - 1]!);
}

/** Index of the first of the rising values that is not below `at`. */
export function firstFrom(x: ArrayLike<number>, at: number): number {
  let [low, high] = [0, x.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle]! < at) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Mean of the runs that reach each place of a common grid, and mean ± standard deviation (n − 1) or least and most around it. */
export function banded(curves: readonly Curve[], kind: "sd" | "range"): Pick<Drawn, "x" | "y" | "band"> {
  const told = curves.filter((curve) => curve.x.length);
  const from = Math.min(...told.map((curve) => curve.x[0]!));
  const to = Math.max(...told.map((curve) => curve.x.at(-1)!));
  const count = told.length ? (to > from ? GRID : 1) : 0;
  const x = Float64Array.from({ length: count }, (_, i) => (i === count - 1 ? to : from + ((to - from) * i) / (count - 1)));
  const [y, low, high] = [new Float64Array(count), new Float64Array(count), new Float64Array(count)];
  for (let i = 0; i < count; i++) {
    const values = told.map((curve) => valueAt(curve, x[i]!)).filter((value) => value !== null);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const sd = values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)) : 0;
    y[i] = mean;
    low[i] = kind === "sd" ? mean - sd : Math.min(...values);
    high[i] = kind === "sd" ? mean + sd : Math.max(...values);
  }
  return { x, y, band: { low, high } };
}

/** Comma-separated values of what is shown, one line a point; names are quoted. */
export function csv({ name, x, data }: Comparison, shown: (job: string) => boolean): string {
  const quoted = (text: string) => `"${text.replaceAll('"', '""')}"`;
  const lines = data.filter((curve) => shown(curve.job)).flatMap((curve) => curve.x.map((at, i) => `${curve.job},${quoted(curve.run)},${at},${curve.values[i] ?? ""}`));
  return [`job,run,${x},${name}`, ...lines, ""].join("\n");
}
