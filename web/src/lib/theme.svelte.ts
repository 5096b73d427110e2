/** Light, dark, or as the system says; remembered in this browser. */

export type Theme = "system" | "light" | "dark";

const KEY = "powergrad.theme";
const dark = window.matchMedia("(prefers-color-scheme: dark)");

class ThemeState {
  chosen = $state<Theme>((localStorage.getItem(KEY) as Theme | null) ?? "system");
  #system = $state(dark.matches);

  constructor() {
    dark.addEventListener("change", () => (this.#system = dark.matches));
  }

  get isDark(): boolean {
    return this.chosen === "system" ? this.#system : this.chosen === "dark";
  }

  choose(theme: Theme): void {
    this.chosen = theme;
    if (theme === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, theme);
  }
}

export const theme = new ThemeState();
