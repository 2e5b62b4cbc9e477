// Runs before the page is drawn, so that a chosen appearance does not flash. Without a choice, the system's holds.
try {
  const chosen = localStorage.getItem("pumice.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing shows the system's appearance.
}
