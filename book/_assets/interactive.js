// Draws the figures of a page that can be explored, below the pictures of the same.
for (const place of document.querySelectorAll(".interactive")) {
  vegaEmbed(place, JSON.parse(place.dataset.spec), { actions: false, renderer: "svg" });
}
