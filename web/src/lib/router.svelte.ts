/** Where the user is: path and query of the address bar, the one home of every page's filters, sorting and selections. */

class Location {
  path = $state(window.location.pathname);
  query = $state.raw(new URLSearchParams(window.location.search));

  constructor() {
    window.addEventListener("popstate", () => this.#read());
  }

  /** Go to a page of ours. `replace`: without a step in the history (typing in a filter). */
  go(href: string, { replace = false } = {}): void {
    const before = this.path;
    history[replace ? "replaceState" : "pushState"](null, "", href);
    this.#read();
    if (!replace && this.path !== before) window.scrollTo(0, 0);
  }

  /** Change parts of the query and keep the others; null or "" takes one away, an array repeats it. */
  set(changes: Record<string, string | string[] | null>, { replace = true } = {}): void {
    const query = new URLSearchParams(this.query);
    for (const [name, value] of Object.entries(changes)) {
      query.delete(name);
      for (const one of Array.isArray(value) ? value : [value]) if (one) query.append(name, one);
    }
    const text = query.toString();
    this.go(this.path + (text ? `?${text}` : ""), { replace });
  }

  get(name: string, otherwise = ""): string {
    return this.query.get(name) ?? otherwise;
  }

  all(name: string): string[] {
    return this.query.getAll(name);
  }

  #read(): void {
    this.path = window.location.pathname;
    this.query = new URLSearchParams(window.location.search);
  }
}

export const location = new Location();

/** Follow links within the dashboard without loading the page anew: put on an element around them. */
export function followLinks(node: HTMLElement) {
  const follow = (event: MouseEvent) => {
    const link = (event.target as Element).closest("a");
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    if (link.origin !== window.location.origin || link.target || link.hasAttribute("download") || link.dataset.leave !== undefined) return;
    event.preventDefault();
    location.go(link.pathname + link.search + link.hash);
  };
  node.addEventListener("click", follow);
  return { destroy: () => node.removeEventListener("click", follow) };
}
