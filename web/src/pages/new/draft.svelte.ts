/** A spec that is being written: its text in YAML is the truth, the form reads and changes that, comments and all. */

import { isMap, LineCounter, parseDocument, stringify, type Document } from "yaml";
import { isObject } from "./schema";

/** Text that every reader of YAML takes for the same: 1.1, which reads `yes` as true, too. */
export const written = (value: unknown): string => stringify(value, { lineWidth: 0, compat: "yaml-1.1" });

export const FIRST = "data:\n  dataset: digits\nmodel:\n  name: resnet8\nloss:\n  alpha: 0.25\nepochs: 20\n";

export class Draft {
  text = $state(FIRST);
  /** Of unions that have a default: the kind it is of, as {optimizer: {name: "sgd"}}. */
  kinds: Record<string, Record<string, unknown>> = {};

  #lines = $derived.by(() => {
    const lines = new LineCounter();
    return { lines, document: parseDocument(this.text, { lineCounter: lines }) };
  });
  /** What is wrong with the YAML itself. */
  syntax = $derived.by<{ line: number; message: string } | null>(() => {
    const first = this.#lines.document.errors[0];
    if (first) return { line: first.linePos?.[0].line ?? 1, message: first.message.split("\n")[0]! };
    return isObject(this.#lines.document.toJS()) ? null : { line: 1, message: "A spec is a map: data:, model:, …" };
  });
  /** Null while the text is no YAML. */
  spec = $derived<Record<string, unknown> | null>(this.syntax ? null : (this.#lines.document.toJS() as Record<string, unknown>));

  take(spec: unknown): void {
    this.text = written(spec);
  }

  at(path: readonly string[]): unknown {
    return path.reduce<unknown>((value, name) => (isObject(value) ? value[name] : undefined), this.spec);
  }

  /** undefined takes the setting away, and objects that are empty then with it. */
  set(path: readonly string[], value: unknown): void {
    const document = parseDocument(this.text, { compat: "yaml-1.1" }) as Document;
    for (let depth = 1; depth < path.length; depth++) this.#open(document, path.slice(0, depth));
    if (value === undefined) prune(document, path);
    else document.setIn(path, document.createNode(value));
    this.text = document.toString({ lineWidth: 0 });
  }

  /** A setting within an object that is not written yet belongs to the default one: its kind is then written too. */
  #open(document: Document, path: readonly string[]): void {
    if (isMap(document.getIn(path))) return;
    document.setIn(path, document.createNode((path.length === 1 && this.kinds[path[0]!]) || {}));
  }

  /** The line, from 1, of what a JSON pointer means, or of what is nearest around it. */
  lineOf(pointer: string): number {
    const path: (string | number)[] = pointer.split("/").slice(1).map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
    const { lines, document } = this.#lines;
    for (; path.length; path.pop()) {
      const parent = path.length > 1 ? document.getIn(path.slice(0, -1), true) : document.contents;
      const name = path.at(-1);
      const pair = isMap(parent) ? parent.items.find((one) => String(one.key) === name) : undefined;
      const range = (pair?.key as { range?: [number, number, number] } | undefined)?.range;
      if (range) return lines.linePos(range[0]).line;
    }
    return 1;
  }
}

function prune(document: Document, path: readonly string[]): void {
  if (document.hasIn(path)) document.deleteIn(path);
  for (let depth = path.length - 1; depth > 0; depth--) {
    const parent = document.getIn(path.slice(0, depth));
    if (!isMap(parent) || parent.items.length) return;
    document.deleteIn(path.slice(0, depth));
  }
}
