/** One move for many jobs. */

import { post } from "../../lib/api";

export type Action = "cancel" | "pause" | "resume" | "delete";
export interface BulkResult {
  action: Action;
  done: string[];
  refused: { id: string; code: string; detail: string }[];
}

export const DONE: Record<Action, string> = { cancel: "cancelled", pause: "paused", resume: "resumed", delete: "deleted" };
export const MOST = 500;

export const move = (action: Action, ids: string[]): Promise<BulkResult> => post<BulkResult>(`/v1/jobs/${action}`, { ids });

/** "12 cancelled, 1 could not: …", each reason once with its number. */
export function told({ action, done, refused }: BulkResult): string {
  const first = `${done.length} ${DONE[action]}`;
  if (!refused.length) return `${first}.`;
  const reasons = new Map<string, number>();
  for (const { id, detail } of refused) {
    const words = detail.replaceAll(id, "the job");
    reasons.set(words, (reasons.get(words) ?? 0) + 1);
  }
  const said = [...reasons].map(([words, count]) => (count > 1 ? `${words} (${count} times)` : words));
  return `${first}, ${refused.length} could not: ${said.join("; ")}`;
}
