/** A job's metric series as they grow, and which of them share a chart. */

import type { Schemas } from "../../lib/api";
import type { JobEvent } from "../../lib/live.svelte";

export type Series = Schemas["SeriesDocument"];

/**
 * What is known, with all points above step `after` replaced by `fresh`. Points of a rolled back past go that way too.
 */
export function merged(known: readonly Series[], fresh: readonly Series[], after: number): Series[] {
  const byName = new Map(fresh.map((one) => [one.name, one]));
  const kept = known.map((one) => {
    const cut = one.steps.findIndex((step) => step > after);
    const more = byName.get(one.name);
    byName.delete(one.name);
    if (cut < 0 && !more?.steps.length) return one;
    const end = cut < 0 ? one.steps.length : cut;
    const steps = [...one.steps.slice(0, end), ...(more?.steps ?? [])];
    return { name: one.name, total: Math.max(steps.length, one.total), steps, values: [...one.values.slice(0, end), ...(more?.values ?? [])] };
  });
  return [...kept, ...byName.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** The step above which the series must be read anew after these events; null where they say nothing of metrics. */
export function readFrom(events: readonly JobEvent[]): number | null {
  const steps = events.flatMap(({ type, data }) => {
    if (type === "metrics") return [Number(data.from_step) - 1];
    if (type === "evaluation") return [Number(data.step) - 1];
    if (type === "rolled_back") return [Number(data.to_step)];
    if (type === "resumed") return [Number(data.from_step)];
    return [];
  });
  return steps.length ? Math.min(...steps) : null;
}

export type Group = { key: string; title: string; series: Series[]; isMain: boolean };

const TITLES: Record<string, string> = {
  loss: "Loss",
  top1: "Top-1 accuracy",
  top5: "Top-5 accuracy",
  lr: "Learning rate",
  images_per_s: "Images per second",
  ece: "Calibration error (ECE)",
  memory_gib: "Memory, GiB",
};
const MAIN = ["loss", "top1", "lr", "images_per_s"];

/** Series that mean the same on different splits share a chart. Scores of the test split, single points, are told elsewhere. */
export function groups(series: readonly Series[]): Group[] {
  const found = new Map<string, Series[]>();
  for (const one of series) {
    if (one.name.startsWith("test_") || !one.steps.length) continue;
    const key = one.name.replace(/^(train|val)_/, "");
    found.set(key, [...(found.get(key) ?? []), one]);
  }
  const place = (key: string) => (Object.keys(TITLES).indexOf(key) + 1 || 99).toString().padStart(2, "0") + key;
  return [...found.entries()]
    .sort(([a], [b]) => (place(a) < place(b) ? -1 : 1))
    .map(([key, members]) => ({ key, title: TITLES[key] ?? key.replaceAll("_", " "), series: members, isMain: MAIN.includes(key) }));
}
