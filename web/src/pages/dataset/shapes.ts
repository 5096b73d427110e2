/** Data sets as the page takes them. */

import type { Schemas } from "../../lib/api";

export type Dataset = Schemas["DatasetDocument"];
export type Summary = Schemas["DatasetSummaryDocument"];
export type BuiltIn = Schemas["CatalogueEntryDocument"] & { title?: string; classes?: number | null; needs_files?: boolean; splits?: string[] };

export function isOwn(entry: Summary | BuiltIn): entry is Summary {
  return "object" in entry && entry.object === "dataset";
}

/** "633 train, 70 val" */
export function splitWords(splits: Record<string, number> | null): string {
  const words = Object.entries(splits ?? {}).map(([split, count]) => `${count.toLocaleString("en")} ${split}`);
  return words.join(", ") || "–";
}
