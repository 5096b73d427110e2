/** A worker's devices as far as they are told. */

export type Device = {
  kind: string;
  name: string;
  uuid?: string;
  memory_bytes?: number | null;
  memory_used_bytes?: number | null;
  utilisation?: number | null;
  quarters_in_use?: number;
  error?: string;
};

/** Share of the whole, 0 to 1; null where one of both is not told. */
export function share(used: number | null | undefined, whole: number | null | undefined): number | null {
  return used === null || used === undefined || !whole ? null : Math.min(1, Math.max(0, used / whole));
}
