/** An experiment's numbers as people read them. */

import type { Schemas } from "../../lib/api";
import { isShare, metric, number } from "../../lib/format";

export type Arm = Schemas["ArmDocument"];
type Interval = { low: number | null; high: number | null };

/** A difference: accuracies in percentage points. */
export function difference(name: string, value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  const sign = value > 0 ? "+" : value < 0 ? "−" : "±";
  const size = Math.abs(value);
  return isShare(name) ? `${sign}${(size * 100).toFixed(2)} pp` : `${sign}${number(size)}`;
}

export function interval({ low, high }: Interval, told: (value: number) => string): string {
  return low === null || high === null ? "–" : `${told(low)} to ${told(high)}`;
}

export function meanAndSpread(name: string, arm: Arm): string {
  if (arm.mean === null) return "–";
  const spread = arm.sd === null ? "" : ` ± ${isShare(name) ? (arm.sd * 100).toFixed(2) : number(arm.sd)}`;
  return metric(name, arm.mean).replace(" %", `${spread} %`) + (isShare(name) ? "" : spread);
}

export function probability(p: number | null | undefined): string {
  if (p === null || p === undefined) return "–";
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

export const CONCLUSIONS: Record<string, string> = { better: "better", worse: "worse", open: "open", identical: "identical", too_few: "too few seeds" };

/** A scale from values to per cent of a width: all intervals and zero fit, with room at both ends. */
export function scale(intervals: readonly (Interval & { mean: number | null })[]): { at: (value: number) => number; ticks: number[] } {
  const values = [0, ...intervals.flatMap((one) => [one.low, one.high, one.mean])].filter((one) => one !== null);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * 0.08 || 1;
  const at = (value: number) => ((value - low + room) / (high - low + 2 * room)) * 100;
  const raw = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const width = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw)!;
  const ticks: number[] = [];
  for (let tick = Math.ceil(low / width); tick <= Math.floor(high / width); tick++) ticks.push(tick * width);
  return { at, ticks };
}
