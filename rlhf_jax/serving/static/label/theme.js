// Runs before anything is drawn, so a chosen theme does not flash. Without a choice, the system's.
const chosenTheme = localStorage.getItem("theme");
if (chosenTheme === "light" || chosenTheme === "dark") document.documentElement.dataset.theme = chosenTheme;
