/** Filters, columns and order that were given a name, kept in this browser. */

const KEY = "powergrad.views";

function stored(): Record<string, string> {
  try {
    const found: unknown = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return Object.fromEntries(Object.entries(found as object).filter((pair): pair is [string, string] => typeof pair[1] === "string"));
  } catch {
    return {}; // not ours, or spoilt: as if there were none
  }
}

class Views {
  /** Query strings by name. */
  all = $state.raw(stored());

  #keep(views: Record<string, string>): void {
    this.all = views;
    localStorage.setItem(KEY, JSON.stringify(views));
  }

  save(name: string, query: string): void {
    this.#keep({ ...this.all, [name]: query });
  }

  forget(name: string): void {
    this.#keep(Object.fromEntries(Object.entries(this.all).filter(([one]) => one !== name)));
  }
}

export const views = new Views();
