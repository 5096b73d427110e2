/** Labels as lines of text: name=value. */

export function labelText(labels: Record<string, string>): string {
  return Object.entries(labels)
    .map(([name, value]) => `${name}=${value}`)
    .join("\n");
}

/** Raises an Error that names the first line which is no label. */
export function labelsOf(text: string): Record<string, string> {
  const lines = text.split("\n").map((line) => line.trim());
  return Object.fromEntries(
    lines.filter(Boolean).map((line) => {
      const at = line.indexOf("=");
      if (at < 1) throw new Error(`“${line}” is no label: write name=value, one a line`);
      return [line.slice(0, at).trim(), line.slice(at + 1).trim()];
    }),
  );
}
