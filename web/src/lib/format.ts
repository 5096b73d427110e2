/** Numbers, times and names as people read them. */

const LONG = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export function time(at: string | null): string {
  return at ? LONG.format(new Date(at)) : "–";
}

/** "3 min ago"; `now` in ms since 1970. */
export function ago(at: string | null, now: number = Date.now()): string {
  if (!at) return "–";
  const seconds = Math.max(0, (now - Date.parse(at)) / 1000);
  return seconds < 5 ? "just now" : `${duration(seconds)} ago`;
}

/** Seconds as the two largest units: "1 h 5 min". */
export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.round(hours / 24)} d`;
}

export function bytes(count: number | null | undefined): string {
  if (count === null || count === undefined) return "–";
  let value = count;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${unit === "B" ? value : value.toPrecision(3)} ${unit}`;
    value /= 1024;
  }
  return `${value.toPrecision(3)} TiB`;
}

/** Fractions of one that are shown as percent. */
export function isShare(metric: string): boolean {
  return /(^|_)(top\d+|accuracy|ece)$/.test(metric);
}

/** A metric's value: accuracies as percent, others with four figures. */
export function metric(name: string, value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return isShare(name) ? `${(value * 100).toFixed(2)} %` : number(value);
}

export function number(value: number): string {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** A value of a spec as one would type it. */
export function setting(value: unknown): string {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** Every leaf of a spec by its dotted path. */
export function flat(value: unknown, prefix = ""): Record<string, unknown> {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return { [prefix]: value };
  return Object.assign({}, ...Object.entries(value).map(([name, one]) => flat(one, prefix ? `${prefix}.${name}` : name))) as Record<string, unknown>;
}
