/** A JSON Schema as a form: each property's shapes, its default and its words. Knows what the server's schema of a job uses. */

export interface Schema {
  $ref?: string;
  $defs?: Record<string, Schema>;
  type?: string;
  const?: unknown;
  enum?: unknown[];
  anyOf?: Schema[];
  oneOf?: Schema[];
  properties?: Record<string, Schema>;
  patternProperties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  default?: unknown;
  title?: string;
  description?: string;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
  exclusiveMaximum?: number;
  examples?: unknown[];
}

export type Shape =
  | { kind: "null" }
  | { kind: "switch" }
  | { kind: "number"; isInteger: boolean; min: number | undefined; max: number | undefined; isOpen: boolean; range: string }
  | { kind: "text" }
  | { kind: "choice"; options: unknown[] }
  | { kind: "many"; options: string[] }
  | { kind: "list"; ofNumbers: boolean }
  | { kind: "map" }
  | { kind: "object"; label: string; description: string; tag: Tag | null; fields: Field[] };

/** The property that says which variant of a union an object is, and what it says there; null values: any other name. */
export interface Tag {
  name: string;
  values: string[] | null;
}

export interface Field {
  name: string;
  path: string[];
  label: string;
  description: string;
  default: unknown;
  isRequired: boolean;
  shapes: Shape[];
}

const TAGS = ["dataset", "name"];
const WORDS: Record<string, string> = { lr: "learning rate", ema: "EMA", gpus: "GPUs", url: "URL", cpu: "CPU", ttl: "TTL" };

/** "min_lr" as "Min learning rate". */
export function words(name: string): string {
  const said = name
    .replace(/([a-z])([A-Z])/g, "$1_$2")
    .split("_")
    .map((one) => WORDS[one.toLowerCase()] ?? one.toLowerCase())
    .join(" ");
  return said.charAt(0).toUpperCase() + said.slice(1);
}

/** A form's fields; what can have one value only is no question. */
export function fieldsOf(schema: Schema, root: Schema = schema, path: string[] = []): Field[] {
  const settable = Object.entries(schema.properties ?? {}).filter(([, one]) => one.const === undefined);
  return settable.map(([name, one]) => {
    const whole = resolved(one, root);
    const own = [...path, name];
    return {
      name,
      path: own,
      label: words(name),
      description: one.description ?? whole.description ?? "",
      default: one.default ?? whole.default,
      isRequired: schema.required?.includes(name) ?? false,
      shapes: shapes(one, root, own),
    };
  });
}

function resolved(schema: Schema, root: Schema): Schema {
  const name = schema.$ref?.replace("#/$defs/", "");
  return name === undefined ? schema : { ...root.$defs?.[name], ...schema, title: schema.title ?? name };
}

function shapes(schema: Schema, root: Schema, path: string[], isUnion = false): Shape[] {
  const one = resolved(schema, root);
  const several = one.anyOf ?? one.oneOf;
  if (several && !one.properties) return merged(several.flatMap((each) => shapes(each, root, path, true)));
  return [shape(one, root, path, isUnion)];
}

function shape(one: Schema, root: Schema, path: string[], isUnion: boolean): Shape {
  if (one.type === "null") return { kind: "null" };
  if (one.properties) return object(one, root, path, isUnion);
  if (one.patternProperties) return { kind: "map" };
  if (one.const !== undefined) return { kind: "choice", options: [one.const] };
  if (one.enum) return { kind: "choice", options: one.enum };
  if (one.type === "boolean") return { kind: "switch" };
  if (one.type === "array") {
    const item = one.items ? resolved(one.items, root) : {};
    if (item.enum) return { kind: "many", options: item.enum.map(String) };
    return { kind: "list", ofNumbers: item.type === "number" || item.type === "integer" };
  }
  if (one.type === "number" || one.type === "integer") return number(one);
  return { kind: "text" };
}

function number(one: Schema): Shape {
  const low = one.minimum ?? one.exclusiveMinimum;
  const high = one.maximum ?? one.exclusiveMaximum;
  const range = low === undefined && high === undefined ? "" : `${one.exclusiveMinimum === undefined ? "" : "above "}${low ?? "…"} to ${one.exclusiveMaximum === undefined ? "" : "below "}${high ?? "…"}`;
  return { kind: "number", isInteger: one.type === "integer", min: low, max: high, isOpen: one.exclusiveMinimum !== undefined, range };
}

function object(one: Schema, root: Schema, path: string[], isUnion: boolean): Shape {
  const tag = isUnion ? tagOf(one, root) : null;
  const fields = fieldsOf(one, root, path);
  const label = tag?.values?.length === 1 ? tag.values[0]! : words((one.title ?? "parts").replace(/(Spec|Data)$/, ""));
  const tagged = tag ? one.properties?.[tag.name]?.description : undefined;
  return { kind: "object", label, description: one.description ?? tagged ?? "", tag, fields };
}

function tagOf(one: Schema, root: Schema): Tag | null {
  for (const name of TAGS) {
    const said = one.properties?.[name];
    if (!said || (said.const === undefined && !one.required?.includes(name))) continue;
    const whole = resolved(said, root);
    const values = whole.const !== undefined ? [String(whole.const)] : (whole.enum?.map(String) ?? null);
    return { name, values };
  }
  return null;
}

/** Whole numbers or certain fractions are one field for numbers; yes or no among others are two choices. */
function merged(all: Shape[]): Shape[] {
  const isNumeric = (one: Shape) => one.kind === "choice" && one.options.every((value) => typeof value === "number");
  const hasFractions = all.some(isNumeric) && all.some((one) => one.kind === "number");
  return all
    .filter((one) => !hasFractions || !isNumeric(one))
    .map((one) => (hasFractions && one.kind === "number" ? { ...one, isInteger: false } : one))
    .map((one) => (one.kind === "switch" ? { kind: "choice", options: [true, false] } : one));
}

/** Which of the shapes a value has; the first one where none fits, as the server then says what is wrong. */
export function shapeOf(value: unknown, all: Shape[]): Shape {
  return all.find((one) => fits(value, one)) ?? all[0]!;
}

function fits(value: unknown, one: Shape): boolean {
  switch (one.kind) {
    case "null":
      return value === null || value === undefined;
    case "switch":
      return typeof value === "boolean";
    case "number":
      return typeof value === "number";
    case "text":
      return typeof value === "string";
    case "choice":
      return one.options.includes(value);
    case "many":
    case "list":
      return Array.isArray(value);
    default:
      return isObject(value) && (one.kind === "map" || !one.tag || hasTag(value, one.tag));
  }
}

function hasTag(value: Record<string, unknown>, tag: Tag): boolean {
  return tag.values === null || tag.values.includes(String(value[tag.name]));
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** What a shape begins with when somebody chooses it; an object keeps of the one before what it knows too. */
export function fresh(one: Shape, before: unknown): unknown {
  switch (one.kind) {
    case "null":
      return null;
    case "switch":
      return false;
    case "number":
      return one.isOpen ? Math.min(1, one.max ?? 1) : (one.min ?? 0);
    case "text":
      return "";
    case "choice":
      return one.options[0];
    case "many":
    case "list":
      return [];
    case "map":
      return {};
    case "object": {
      const known = new Set(one.fields.map((field) => field.name)); // without the tag: the choice itself says that
      const kept = isObject(before) ? Object.entries(before).filter(([name]) => known.has(name) && name !== one.tag?.name) : [];
      const needed = one.fields.filter((field) => field.isRequired).map((field) => [field.name, fresh(field.shapes[0]!, undefined)]);
      return { ...(one.tag && { [one.tag.name]: one.tag.values?.[0] ?? "" }), ...Object.fromEntries([...needed, ...kept]) };
    }
  }
}

/** A spec without what it says by default anyway: short to read, the same job. */
export function withoutDefaults(spec: Record<string, unknown>, fields: Field[]): Record<string, unknown> {
  const left: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(spec)) {
    const field = fields.find((one) => one.name === name);
    if (field && same(value, field.default)) continue;
    const shaped = field && shapeOf(value, field.shapes);
    if (!isObject(value) || shaped?.kind !== "object") {
      left[name] = value;
      continue;
    }
    const short = withoutDefaults(value, shaped.fields);
    const tag = shaped.tag?.name;
    if (Object.keys(short).length || tag || field?.default === null) left[name] = tag ? { [tag]: value[tag], ...short } : short;
  }
  return left;
}

export function same(a: unknown, b: unknown): boolean {
  if (isObject(a) && isObject(b)) {
    const names = Object.keys(a);
    return names.length === Object.keys(b).length && names.every((name) => same(a[name], b[name]));
  }
  return a === b || JSON.stringify(a) === JSON.stringify(b);
}
