/** Chart and format libraries ask Intl for the browser's locale; under a POSIX locale ("en-US@posix") that throws. */
export function repairLocale(): void {
  try {
    new Intl.NumberFormat(navigator.language);
  } catch {
    Object.defineProperty(navigator, "language", { value: "en-US" });
    Object.defineProperty(navigator, "languages", { value: ["en-US"] });
  }
}
