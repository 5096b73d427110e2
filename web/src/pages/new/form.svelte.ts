/** What every field of the form needs: the draft, what the server says of it, and names to choose from. */

import { getContext, setContext } from "svelte";
import { Draft } from "./draft.svelte";
import type { Field } from "./schema";

export class Form {
  draft = new Draft();
  /** By JSON pointer. */
  errors = $state.raw<ReadonlyMap<string, string>>(new Map());
  /** By JSON pointer: values that are known to exist. */
  suggestions = $state.raw<Record<string, string[]>>({});

  /** What is said of a field, or of a part of it that has no field of its own. */
  errorOf(field: Field, withParts: boolean): string | null {
    const pointer = pointerOf(field.path);
    const parts = withParts ? [...this.errors].filter(([one]) => one.startsWith(`${pointer}/`)).map(([, said]) => said) : [];
    return this.errors.get(pointer) ?? parts[0] ?? null;
  }

  hasErrorsIn(field: Field): boolean {
    const pointer = pointerOf(field.path);
    return [...this.errors.keys()].some((one) => one === pointer || one.startsWith(`${pointer}/`));
  }
}

export const pointerOf = (path: readonly string[]): string => `/${path.join("/")}`;
export const idOf = (pointer: string): string => `field:${pointer}`;

const KEY = Symbol("form");
export const provideForm = (): Form => setContext(KEY, new Form());
export const useForm = (): Form => getContext<Form>(KEY);
