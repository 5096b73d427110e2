/** A job's spec as what would make it again. */

/** One word of a POSIX shell. */
export function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A JSON value as Python writes it. */
export function python(value: unknown, indent = 0): string {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = "    ".repeat(indent + 1);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  const items = Array.isArray(value)
    ? value.map((one) => python(one, indent + 1))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent + 1)}`);
  return items.length ? `${open}\n${items.map((one) => `${inner}${one},\n`).join("")}${"    ".repeat(indent)}${close}` : open + close;
}

export function copies(spec: unknown, origin: string, hasKey: boolean): Record<"curl" | "CLI" | "Python", string> {
  const json = JSON.stringify(spec, null, 1);
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $POWERGRAD_API_KEY"` : "";
  return {
    curl: `curl ${origin}/v1/jobs \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(json)}`,
    CLI: `export POWERGRAD_URL=${origin}\nprintf '%s' ${quoted(json)} | powergrad submit - --wait`,
    Python: `from powergrad.client import Client\n\nspec = ${python(spec)}\nwith Client(${JSON.stringify(origin)}) as client:\n    job = client.submit(spec)\n    job = client.wait(job.id)\n`,
  };
}

/** Leaves of both specs by dotted path, where they differ. */
export function differing(own: Record<string, unknown>, other: Record<string, unknown>): Set<string> {
  const paths = [...new Set([...Object.keys(own), ...Object.keys(other)])];
  return new Set(paths.filter((path) => JSON.stringify(own[path]) !== JSON.stringify(other[path])));
}
