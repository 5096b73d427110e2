/** The whole jobs behind the curves, for their settings and best values. */

import { get, type Job } from "../../lib/api";

const AT_ONCE = 6;

/** Jobs by id; those that are gone meanwhile are left out. */
export async function details(ids: readonly string[], signal: AbortSignal): Promise<Map<string, Job>> {
  const found = new Map<string, Job>();
  const missing = [...ids];
  const read = async () => {
    for (let id = missing.shift(); id !== undefined && !signal.aborted; id = missing.shift()) {
      const job = await get<Job>(`/v1/jobs/${id}`, {}, signal).catch(() => null);
      if (job) found.set(id, job);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, read));
  return found;
}
