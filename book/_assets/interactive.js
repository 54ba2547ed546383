// Draws the interactive figures of a page, in place of their static pictures.
for (const place of document.querySelectorAll(".interactive")) {
  const before = (image) => image.compareDocumentPosition(place) & Node.DOCUMENT_POSITION_FOLLOWING;
  const picture = [...document.querySelectorAll("figure img")].filter(before).pop();
  vegaEmbed(place, JSON.parse(place.dataset.spec), { actions: false, renderer: "svg" }).then(() => {
    if (picture) {
      picture.replaceWith(place);
      window.dispatchEvent(new Event("resize")); // the width of its container is known now
    }
  });
}
